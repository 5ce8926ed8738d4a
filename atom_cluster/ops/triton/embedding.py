"""Lookup of token embeddings in a shard of the vocabulary, as one launch. Knows no layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs


def look_up(
    rows_VD: torch.Tensor,
    token_ids_T: torch.Tensor,
    *,
    dtype: torch.dtype,
    factor: float = 1.0,
    shard: range | None = None,
) -> torch.Tensor:
    """See `ops.embedding.LookUp`."""
    num_tokens, size = len(token_ids_T), rows_VD.shape[1]
    out_TD = torch.empty((num_tokens, size), dtype=dtype, device=rows_VD.device)
    start, stop = (0, len(rows_VD)) if shard is None else (shard.start, shard.stop)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _look_up_kernel[(num_tokens, triton.cdiv(size, block))](
            rows_VD,
            token_ids_T,
            out_TD,
            start,
            stop,
            factor,
            size,
            rows_VD.stride(0),
            BLOCK=block,
            MULTIPLIES=factor != 1.0,
            num_warps=max(1, block * rows_VD.element_size() // (16 * (64 if runtime.is_hip() else 32))),
            **launch_options(),
        )
    return out_TD


@triton.jit
def _look_up_kernel(
    rows_ptr,
    ids_ptr,
    out_ptr,
    start,
    stop,
    factor,
    size,
    row_stride,
    BLOCK: tl.constexpr,
    MULTIPLIES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < size
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token_id = tl.load(ids_ptr + token).to(tl.int64)
    is_here = (token_id >= start) & (token_id < stop)
    x = tl.load(rows_ptr + (token_id - start) * row_stride + column, is_inside & is_here, other=0.0)
    x = x.to(out_ptr.dtype.element_ty)
    if MULTIPLIES:
        x = (x.to(tl.float32) * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * size + column, x, is_inside)
