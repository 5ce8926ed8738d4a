"""How `moe_gemm_hopper` stores what four warps have summed up: by way of shared memory, so that lines are whole.

Knows no weights and no tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def store_rows(sums, pair, smem, out_ptr, first, stop, block, size):
    """Where their pairs are."""
    HALF: gl.constexpr = sums.shape[0]
    BLOCK: gl.constexpr = sums.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, wide))
    column = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, wide))
    # What was stored there before has been read by all four warps.
    gl.thread_barrier()
    smem.store(sums.to(smem.dtype))
    pair = gl.convert_layout(pair, gl.SliceLayout(1, wide))
    gl.thread_barrier()
    ptrs = out_ptr + pair.to(gl.int64)[:, None] * size + column[None, :]
    gl.store(ptrs, smem.load(wide), mask=(row < stop)[:, None] & (column < size)[None, :])


@gluon.jit
def store_activated(
    gate,
    up,
    smem,
    results,
    first,
    stop,
    block,
    size,
    DTYPE: gl.constexpr,
    IS_OAI: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
):
    """Codes of activated rows, in their order, and their scales; as `quantize` computes them from DTYPE."""
    out_ptr, out_scale_ptr, alpha, limit = results
    HALF: gl.constexpr = gate.shape[0]
    BLOCK: gl.constexpr = gate.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    if HAS_LIMIT:
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
    if IS_OAI:
        hidden = (up + 1.0) * gate / (1.0 + gl.exp(-gate * alpha))
    else:
        hidden = up * gate / (1.0 + gl.exp(-gate))
    hidden = hidden.to(DTYPE).to(gl.float32)
    largest = gl.max(gl.abs(hidden), axis=1)
    scale = gl.where(largest > 0, gl.div_rn(largest, largest * 0.0 + 448.0), 1.0)
    inverse = gl.div_rn(scale * 0.0 + 1.0, scale)
    inverse = gl.where(inverse < float("inf"), inverse, 0.0)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, mma))
    scale_ptrs = out_scale_ptr + row.to(gl.int64) * (size // BLOCK) + block
    gl.store(scale_ptrs, scale, mask=row < stop)
    # What was stored there before has been read by all four warps.
    gl.thread_barrier()
    # The conversion stops at the largest code by itself.
    smem.store((hidden * inverse[:, None]).to(smem.dtype))
    gl.thread_barrier()
    wide_row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, wide))
    column = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, wide))
    ptrs = out_ptr + wide_row.to(gl.int64)[:, None] * size + column[None, :]
    gl.store(ptrs, smem.load(wide), mask=(wide_row < stop)[:, None])
