"""Kernels that Triton compiled in this process, or read from its cache, since somebody last asked.

Launches wait for that, so a step during which it happens says so. Knows no kernels.
"""

from __future__ import annotations

import time
from typing import Any

import triton

_MOST_KEPT = 100
_taken: list[tuple[str, float]] = []
_began_s = 0.0


def take_compiled() -> tuple[tuple[str, float], ...]:
    """Names of kernels and the seconds that each took, since the last call."""
    found = tuple(_taken)
    _taken.clear()
    return found


def _begin(**_: Any) -> None:
    global _began_s  # noqa: PLW0603 - Triton calls this and the next one in turn
    _began_s = time.perf_counter()


def _end(*, fn: Any, **_: Any) -> None:
    if len(_taken) < _MOST_KEPT:
        _taken.append((f"{fn.module.rpartition('.')[2]}.{fn.name}", time.perf_counter() - _began_s))


def watch_compilations() -> None:
    """Note from now on what is compiled; for a version of Triton that cannot tell, nothing."""
    runtime = triton.knobs.runtime
    if hasattr(runtime, "jit_cache_hook") and hasattr(runtime, "jit_post_compile_hook"):
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = _begin, _end
