"""EngineHost: what a gang needs of the engine in rank 0's process, and dotted paths to make one. Imports no engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from atom_cluster.errors import ConfigError
from atom_cluster.messages.cluster import EngineStatus, MemberCard


class EngineHost(Protocol):
    """An engine and its sockets, in threads of their own. Methods may be called from any thread and return soon."""

    def start(self) -> MemberCard:
        """Begin to serve; what to announce about this engine."""
        ...

    def status(self) -> EngineStatus:
        """The engine now."""
        ...

    def begin_drain(self, timeout_s: float) -> None:
        """Take no more requests; finish those there are, and let others go on with what is left after so long."""
        ...

    def is_idle(self) -> bool:
        """Whether no request is left."""
        ...

    def failure(self) -> str | None:
        """Why the engine stopped by itself; None while it runs."""
        ...

    def close(self) -> None:
        """Stop the engine and close its runner. Idempotent."""
        ...


def resolve(path: str) -> Callable[..., object]:
    """The callable that `module:name` names. Raises `ConfigError` when there is none."""
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"cannot import {path!r}: {exc}") from exc
    if not callable(found):
        raise ConfigError(f"{path!r} is not callable")
    return cast("Callable[..., object]", found)
