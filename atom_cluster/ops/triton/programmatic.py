"""Programmatic dependent launch (sm_90): a kernel may start while the one before it ends. Knows no kernels.

A kernel that is launched with `launch_options()` begins when all programs of the kernel before it have called
`let_next_start` or have ended. Until `wait_for_inputs` it may only read what no kernel writes (weights), and write
nothing; behind it, everything that earlier kernels wrote is there. Every program that reads or writes other memory has
to call it. A kernel before it that takes no part simply ends first. Elsewhere all of this is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from atom_cluster.ops.triton import runtime

LINE_BYTES, LINES_AHEAD = tl.constexpr(128), tl.constexpr(8)
"""Of an output's weights, what programs of products fetch before their inputs are there."""


def launch_options() -> dict[str, bool]:
    """Keyword arguments of a launch. `OVERLAPS` is the kernel's, whether it calls the two functions below."""
    return {"OVERLAPS": True, "launch_pdl": True} if runtime.is_hopper() else {"OVERLAPS": False}


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Until all that earlier kernels wrote can be read."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def fetch_ahead(ptrs, OVERLAPS: tl.constexpr):
    """Starts to bring lines of memory that no kernel writes into the cache that all programs share."""
    if OVERLAPS:
        # One instruction per line, which answers nothing.
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """This program does not mind if programs of the next kernel take what room is left on the chip.

    At the start where programs are short; where each reads much, behind that: the next would only take turns with it.
    """
    if OVERLAPS:
        gdc_launch_dependents()
