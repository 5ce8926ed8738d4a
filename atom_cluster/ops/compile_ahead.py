"""CompileAhead: kernels that launches would compile one after the other, compiled side by side before."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class CompiledAhead:
    """What came of it; complete when the context is left."""

    num_kernels: int = 0
    """Variants of kernels that were asked for."""
    num_compiled: int = 0
    """Of these, what no earlier process had left in the cache on disk."""


class CompileAhead(Protocol):
    """Makes a context in which launches by this thread compute nothing: their kernels are compiled, in threads."""

    def __call__(
        self, device: torch.device, *, num_threads: int, begin_at: float = 0.0
    ) -> AbstractContextManager[CompiledAhead]:
        """What kernels would have written stays as it was, and `torch.empty` makes zeros, as indices have to be some.

        Leaving the context compiles and loads all kernels. What cannot be compiled is left to the launch that needs it,
        whose error tells why. begin_at: with which of the kernels, from 0 for the first to 1 behind the last. Processes
        with one cache on disk that compile the same, from other ones on, read what the others have compiled.
        """
        ...
