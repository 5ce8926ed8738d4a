"""A barrier between what all threads of a program store and what one of them then tells other programs. For kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def barrier_behind_stores():
    """Behind it, an atomic operation that releases covers the stores of all threads, not of the one that does it alone.

    On NVIDIA any barrier is one. On AMD a barrier waits for threads, and a release for stores of its own wavefront:
    those of others could still be under way to memory when another multiprocessor or chip hears of them.
    """
    if not _INTERPRETED and is_hip():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0", "=v", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
