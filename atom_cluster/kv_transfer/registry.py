"""Which KV transports there are: names to dotted paths, imported when one is opened. Best first.

Knows no transport's internals; importing this file imports neither torch nor any transport.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from atom_cluster.errors import ConfigError

if TYPE_CHECKING:
    from atom_cluster.kv_transfer.protocol import KvTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """What any transport may need to know about the rank it works for."""

    rank: int
    host: str
    """Address of this node, IPv4 or IPv6, that listeners bind to. Never a wildcard."""
    secret: bytes = field(repr=False)
    """The cluster's secret, at least 16 bytes."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    """`module:function`, a function from `TransportSettings` to a `KvTransport`."""
    device_types: tuple[str, ...]


_TRANSPORTS = {
    "shm": _Entry("atom_cluster.kv_transfer.shm:open_transport", ("cpu",)),
    "tcp": _Entry("atom_cluster.kv_transfer.tcp:open_transport", ("cpu", "cuda")),
}


def available(device_type: str) -> tuple[str, ...]:
    """Names of the transports for KV memory on this type of device (`cpu`, `cuda`), best first."""
    return tuple(name for name, entry in _TRANSPORTS.items() if device_type in entry.device_types)


def open_transport(name: str, settings: TransportSettings) -> KvTransport:
    """Import and open a transport. Raises `ConfigError` for an unknown name, `TransferError` if it cannot work here."""
    entry = _TRANSPORTS.get(name)
    if entry is None:
        raise ConfigError(f"kv_transfer.transport: no transport {name!r}; there are {', '.join(_TRANSPORTS)}")
    module, _, function = entry.path.partition(":")
    opener = getattr(importlib.import_module(module), function)
    return cast("Callable[[TransportSettings], KvTransport]", opener)(settings)
