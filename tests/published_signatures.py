"""Signatures of packages that cannot be imported here, as `scripts/read-signatures` wrote them down."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


def read_signatures(file: Path) -> dict[str, dict[str, inspect.Signature]]:
    """By version, and by "module:name"."""
    versions = json.loads(file.read_text())
    return {
        version: {name: rebuilt(parameters) for name, parameters in found["signatures"].items()}
        for version, found in versions.items()
    }


def rebuilt(parameters: str) -> inspect.Signature:
    namespace: dict[str, Any] = {}
    exec(f"def function({parameters}): ...", namespace)
    return inspect.signature(namespace["function"])


def with_signature(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A function that takes what the signature says, by keyword alone, and passes on what it was given."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        assert not args, "calls are by keyword"
        signature.bind(**kwargs)
        return function(**kwargs)

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked
