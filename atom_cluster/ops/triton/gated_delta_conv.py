"""The short convolution of Gated DeltaNet, and its states. Knows no layers. Shape suffixes as in `ops.gated_delta`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.gated_delta import StateMetadata
from atom_cluster.ops.triton.gated_delta_chunks import CHUNK_TOKENS, Chunks
from atom_cluster.ops.triton.gated_delta_step import SteppedRows
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

_CHUNK_CHANNELS = 32
_CHUNK_WARPS = 4
_STEP_CHANNELS = 256
_STEP_WARPS = 2


def convolve_steps(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    past_NCJ: torch.Tensor,
    y_TC: torch.Tensor,
    rows: SteppedRows,
    states: StateMetadata,
) -> None:
    """Writes the outputs of the rows' tokens, and states into their pages."""
    num_channels, width = weight_CW.shape
    block = _STEP_CHANNELS
    _step_kernel[(triton.cdiv(num_channels, block), rows.num_rows)](
        x_TC,
        weight_CW,
        past_NCJ,
        y_TC,
        rows.query_start if rows.rows is None else rows.rows,
        rows.query_start,
        states.read_page,
        states.write_page,
        states.write_page.stride(0),
        num_channels,
        x_TC.stride(0),
        *weight_CW.stride(),
        past_NCJ.stride(0),
        WIDTH=width,
        PAST_BLOCK=triton.next_power_of_2(width),
        BLOCK=block,
        HAS_ONE_TOKEN=rows.has_one_token,
        HAS_LIST=rows.rows is not None,
        num_warps=_STEP_WARPS,
        **launch_options(),
    )


def convolve_chunks(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    past_NCJ: torch.Tensor,
    y_TC: torch.Tensor,
    chunks: Chunks,
    states: StateMetadata,
) -> None:
    """Writes the outputs of the rows' tokens, and their last states into their pages."""
    num_channels, width = weight_CW.shape
    block = _CHUNK_CHANNELS
    _chunk_kernel[(triton.cdiv(num_channels, block), chunks.num_chunks)](
        x_TC,
        weight_CW,
        past_NCJ,
        y_TC,
        chunks.chunks,
        states.read_page,
        states.write_page,
        states.write_page.stride(0),
        num_channels,
        x_TC.stride(0),
        *weight_CW.stride(),
        past_NCJ.stride(0),
        WIDTH=width,
        PAST_BLOCK=triton.next_power_of_2(width),
        BLOCK=block,
        CHUNK=CHUNK_TOKENS,
        num_warps=_CHUNK_WARPS,
    )


@triton.jit(**varying("rows_ptr", "query_start_ptr", "read_page_ptr", "write_page_ptr"))
def _step_kernel(
    x_ptr,
    weight_ptr,
    past_ptr,
    y_ptr,
    rows_ptr,
    query_start_ptr,
    read_page_ptr,
    write_page_ptr,
    write_page_stride,
    num_channels,
    x_stride,
    weight_stride,
    place_stride,
    page_stride,
    WIDTH: tl.constexpr,
    PAST_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ONE_TOKEN: tl.constexpr,
    HAS_LIST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Seen inputs are looked up anew for each token, in the state before the row or among its tokens."""
    row = tl.program_id(1)
    channel = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    place = tl.arange(0, PAST_BLOCK)[None, :]
    has_channel = channel < num_channels
    weight = tl.load(
        weight_ptr + channel * weight_stride + place * place_stride, has_channel & (place < WIDTH), other=0.0
    )
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    if HAS_LIST:
        row = tl.load(rows_ptr + row)
    page = tl.load(read_page_ptr + row).to(tl.int64)
    if HAS_ONE_TOKEN:
        start, num_tokens = row.to(tl.int64), 1
    else:
        start = tl.load(query_start_ptr + row).to(tl.int64)
        num_tokens = (tl.load(query_start_ptr + row + 1) - start).to(tl.int32)
    past_ptrs = past_ptr + channel * (WIDTH - 1) + place
    # Input i of the past is in column i; that of the row's token j would be in column WIDTH - 1 + j.
    past = tl.load(past_ptrs + page * page_stride, has_channel & (place < WIDTH - 1) & (page >= 0), other=0.0).to(
        tl.float32
    )
    for index in range(num_tokens):
        token = start + index
        new = tl.load(x_ptr + token * x_stride + channel, has_channel, other=0.0).to(tl.float32)
        seen = tl.where(place == WIDTH - 1, new, past)
        total = tl.sum(seen * weight.to(tl.float32), axis=1)[:, None]
        tl.store(y_ptr + token * num_channels + channel, total * tl.sigmoid(total), has_channel)
        # The next past is this one without its oldest input: column i has what column i + 1 had.
        shifted = tl.gather(seen, tl.broadcast_to(tl.minimum(place + 1, PAST_BLOCK - 1), (BLOCK, PAST_BLOCK)), axis=1)
        past = shifted
        page = tl.load(write_page_ptr + row * write_page_stride + index).to(tl.int64)
        tl.store(past_ptrs + page * page_stride, past, has_channel & (place < WIDTH - 1))


@triton.jit(**varying("read_page_ptr", "write_page_ptr"))
def _chunk_kernel(
    x_ptr,
    weight_ptr,
    past_ptr,
    y_ptr,
    chunks_ptr,
    read_page_ptr,
    write_page_ptr,
    write_page_stride,
    num_channels,
    x_stride,
    weight_stride,
    place_stride,
    page_stride,
    WIDTH: tl.constexpr,
    PAST_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A row's first chunk alone looks into the past, and it leaves the new state there, which it reads among the row's
    last tokens: so nobody reads what another block has overwritten."""
    PAST: tl.constexpr = WIDTH - 1
    chunk = tl.program_id(1)
    chunks_ptr += 4 * chunk
    row = tl.load(chunks_ptr)
    first = tl.load(chunks_ptr + 1)
    begin = tl.load(chunks_ptr + 2)
    end = tl.load(chunks_ptr + 3)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < num_channels
    weight_ptr += channel * weight_stride
    token = first + tl.arange(0, CHUNK)[:, None]
    is_inside = (token < end) & (token >= begin + PAST) & has_channel[None, :]
    x_ptrs = x_ptr + token.to(tl.int64) * x_stride + channel[None, :]
    y_ptrs = y_ptr + token.to(tl.int64) * num_channels + channel[None, :]
    total = tl.zeros([CHUNK, BLOCK], tl.float32)
    for place in tl.static_range(WIDTH):
        x = tl.load(x_ptrs + (place - PAST) * x_stride, is_inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + place * place_stride, has_channel, other=0.0).to(tl.float32)
        total += x * weight[None, :]
    tl.store(y_ptrs, total * tl.sigmoid(total), is_inside)
    if first == begin:
        # Tokens that see inputs of before the step, and the state behind the row, which may have such inputs too.
        page = tl.load(read_page_ptr + row).to(tl.int64)
        old_ptr = past_ptr + page * page_stride
        index = tl.arange(0, PAST_BLOCK)[None, :]
        in_past = has_channel[:, None] & (index < PAST)
        is_early = in_past & (begin + index < end)
        early = tl.zeros([BLOCK, PAST_BLOCK], tl.float32)
        for place in tl.static_range(WIDTH):
            seen = _seen_input(x_ptr, old_ptr, channel[:, None], index + place, begin, x_stride, PAST, is_early, page)
            weight = tl.load(weight_ptr + place * place_stride, has_channel, other=0.0).to(tl.float32)
            early += seen.to(tl.float32) * weight[:, None]
        early_ptrs = y_ptr + (begin + index).to(tl.int64) * num_channels + channel[:, None]
        tl.store(early_ptrs, early * tl.sigmoid(early), is_early)
        last = _seen_input(x_ptr, old_ptr, channel[:, None], end - begin + index, begin, x_stride, PAST, in_past, page)
        # All of the block's threads have read the old state when the first of them writes the new one.
        tl.debug_barrier()
        new_page = tl.load(write_page_ptr + row * write_page_stride).to(tl.int64)
        tl.store(past_ptr + new_page * page_stride + channel[:, None] * PAST + index, last, in_past)


@triton.jit
def _seen_input(x_ptr, old_ptr, channel, column, begin, x_stride, PAST: tl.constexpr, is_wanted, page):
    """A row's inputs by column: PAST of before the step, then those of its tokens."""
    is_old = column < PAST
    old = tl.load(old_ptr + channel * PAST + column, is_wanted & is_old & (page >= 0), other=0.0)
    new_ptrs = x_ptr + (begin + column - PAST).to(tl.int64) * x_stride + channel
    return tl.where(is_old, old, tl.load(new_ptrs, is_wanted & (column >= PAST), other=0.0))
