"""How functions of AITER are found and called. Knows no ops.

AITER's signatures differ between versions, in the order of parameters too: so every call is by keyword, and a function
is used only if the installed version has it with the parameters that its calls name. Importing the package needs ROCm:
it builds and asks for the GPU while it is imported, and fails in many ways where there is none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AssertionError)
"""What importing AITER raises where there is no ROCm, no compiler for it, or no GPU."""

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""What its kernels compute in."""


class AiterFunction:
    """A function of AITER and the parameters that are passed to it, all by name."""

    def __init__(self, module: str, name: str, *parameters: str, optional: Sequence[str] = ()) -> None:
        """optional: parameters that some versions do not have, because they find out themselves what is in them."""
        self.module = module
        self.name = name
        self.parameters = parameters
        self.optional = tuple(optional)

    def __call__(self, **arguments: Any) -> Any:
        """Call it; in place of `why_not`, errors are those of the import."""
        function = self._find()
        if self.optional:
            known = _parameters(function)
            arguments = {name: value for name, value in arguments.items() if self._is_passed(name, known)}
        return function(**arguments)

    def why_not(self) -> str | None:
        """Why this version of AITER cannot be called like that; None: it can."""
        try:
            function = self._find()
        except IMPORT_ERRORS as error:
            return f"{self.module} cannot be imported: {type(error).__name__}: {error}"
        except AttributeError:
            return f"{self.module} has no {self.name}"
        return self.mismatch(_signature(function))

    def mismatch(self, signature: inspect.Signature | None) -> str | None:
        """Why a function of this signature cannot be called like that. None as a signature: it is not known."""
        if signature is None:
            return None
        known = _names(signature)
        passed = [name for name in (*self.parameters, *self.optional) if self._is_passed(name, known)]
        try:
            signature.bind(**dict.fromkeys(passed))
        except TypeError as error:
            return f"{self.module}.{self.name}: {error}"
        return None

    def _is_passed(self, name: str, known: frozenset[str] | None) -> bool:
        return name not in self.optional or known is None or name in known

    def _find(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return function


def aiter_version() -> str | None:
    """The installed version; None where the package is not installed."""
    if importlib.util.find_spec("aiter") is None:
        return None
    names = importlib.metadata.packages_distributions().get("aiter", [])
    return importlib.metadata.version(names[0]) if names else "of unknown version"


def why_not(functions: Sequence[AiterFunction]) -> str | None:
    """Why not all of these can be called; None: they can."""
    return next((reason for function in functions if (reason := function.why_not()) is not None), None)


def why_not_imported() -> str | None:
    """Why the package cannot be imported; None: it can."""
    try:
        importlib.import_module("aiter")
    except IMPORT_ERRORS as error:
        return f"aiter cannot be imported: {type(error).__name__}: {error}"
    return None


def enum_member(enum: str, member: str) -> Any:
    """A member of one of AITER's enums, such as QuantType.per_Token; they exist once the package is imported."""
    package: ModuleType = importlib.import_module("aiter")
    return getattr(getattr(package, enum), member)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None for native functions, and for wrappers that pass on whatever they are given."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return None if inspect.Parameter.VAR_KEYWORD in kinds else signature


def _names(signature: inspect.Signature) -> frozenset[str]:
    return frozenset(signature.parameters)


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the parameters, if they are known."""
    signature = _signature(function)
    return None if signature is None else _names(signature)
