"""Hyper-connections: projection of a token's streams, what a block reads of them, and the streams behind it.

Knows no layers. The projection is split over its inputs, as it has few outputs and, in decode steps, few tokens; what
reads the streams adds the parts up. Shape suffixes as in `ops.streams`, and S parts of the projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.streams import StreamRule
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

_INPUT_BLOCK = 128


def connect_streams(
    streams_TND: torch.Tensor, fn_JI: torch.Tensor, scale_3: torch.Tensor, bias_J: torch.Tensor, rule: StreamRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.streams.ConnectStreams`."""
    num_tokens, num_streams, _ = streams_TND.shape
    write_TN = torch.empty((num_tokens, num_streams), dtype=streams_TND.dtype, device=streams_TND.device)
    mix_TNN = torch.empty((num_tokens, num_streams, num_streams), dtype=streams_TND.dtype, device=streams_TND.device)
    x_TD = _read(streams_TND, fn_JI, scale_3, bias_J, rule, write_TN, mix_TNN)
    return x_TD, write_TN, mix_TNN


def join_streams(
    streams_TND: torch.Tensor, fn_NI: torch.Tensor, scale_1: torch.Tensor, bias_N: torch.Tensor, rule: StreamRule
) -> torch.Tensor:
    """See `ops.streams.JoinStreams`."""
    return _read(streams_TND, fn_NI, scale_1, bias_N, rule)


def write_streams(
    streams_TND: torch.Tensor, output_TD: torch.Tensor, write_TN: torch.Tensor, mix_TNN: torch.Tensor
) -> torch.Tensor:
    """See `ops.streams.WriteStreams`."""
    streams_TND, output_TD = streams_TND.contiguous(), output_TD.contiguous()
    num_tokens, num_streams, size = streams_TND.shape
    out_TND = torch.empty_like(streams_TND)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _write_kernel[(num_tokens, triton.cdiv(size, block))](
            streams_TND,
            output_TD,
            write_TN.contiguous(),
            mix_TNN.contiguous(),
            out_TND,
            size,
            NUM=num_streams,
            NUM_BLOCK=triton.next_power_of_2(num_streams),
            BLOCK=block,
            num_warps=2 if runtime.is_hip() else 4,
            **launch_options(),
        )
    return out_TND


def _read(
    streams_TND: torch.Tensor,
    fn_JI: torch.Tensor,
    scale: torch.Tensor,
    bias_J: torch.Tensor,
    rule: StreamRule,
    write_TN: torch.Tensor | None = None,
    mix_TNN: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a block reads, [T, D]; writes how its output is to be written, if that is asked for."""
    streams_TND = streams_TND.contiguous()
    num_tokens, num_streams, size = streams_TND.shape
    x_TD = torch.empty((num_tokens, size), dtype=streams_TND.dtype, device=streams_TND.device)
    if not num_tokens:
        return x_TD
    logit_STJ, square_ST = _project(streams_TND, fn_JI)
    block = min(1024, triton.next_power_of_2(size))
    _read_kernel[(num_tokens, triton.cdiv(size, block))](
        streams_TND,
        logit_STJ,
        square_ST,
        scale,
        bias_J,
        x_TD,
        x_TD if write_TN is None else write_TN,
        x_TD if mix_TNN is None else mix_TNN,
        len(logit_STJ),
        size,
        rule.norm_eps,
        rule.eps,
        NUM=num_streams,
        NUM_BLOCK=triton.next_power_of_2(num_streams),
        NUM_OUTPUTS=logit_STJ.shape[2],
        PARTS=triton.next_power_of_2(len(logit_STJ)),
        BLOCK=block,
        NUM_ITERATIONS=rule.num_iterations,
        MIXES=mix_TNN is not None,
        num_warps=2 if runtime.is_hip() else 4,
        **launch_options(),
    )
    return x_TD


def _project(streams_TND: torch.Tensor, fn_JI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fn * S, |S|^2) in parts: [S, T, J], [S, T], float32."""
    num_tokens, (num_outputs, num_inputs) = len(streams_TND), fn_JI.shape
    token_block = 16 if num_tokens <= 512 else 64
    num_token_blocks = triton.cdiv(num_tokens, token_block)
    wanted = max(1, 2 * runtime.num_multiprocessors(fn_JI.device) // num_token_blocks)
    blocks_per_part = triton.cdiv(triton.cdiv(num_inputs, _INPUT_BLOCK), wanted)
    num_parts = triton.cdiv(num_inputs, _INPUT_BLOCK * blocks_per_part)
    logit_STJ = torch.empty((num_parts, num_tokens, num_outputs), dtype=torch.float32, device=fn_JI.device)
    square_ST = torch.empty((num_parts, num_tokens), dtype=torch.float32, device=fn_JI.device)
    _project_kernel[(num_token_blocks, num_parts)](
        streams_TND,
        fn_JI,
        logit_STJ,
        square_ST,
        num_tokens,
        num_inputs,
        blocks_per_part,
        NUM_OUTPUTS=num_outputs,
        OUTPUT_BLOCK=max(16, triton.next_power_of_2(num_outputs)),
        TOKEN_BLOCK=token_block,
        INPUT_BLOCK=_INPUT_BLOCK,
        IS_BFLOAT16=streams_TND.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=1 if streams_TND.dtype != torch.bfloat16 else 4 if runtime.is_hopper() else 2,
        **launch_options(),
    )
    return logit_STJ, square_ST


@triton.jit(**varying("num_tokens", "blocks_per_part"))
def _project_kernel(
    streams_ptr,
    fn_ptr,
    logit_ptr,
    square_ptr,
    num_tokens,
    num_inputs,
    blocks_per_part,
    NUM_OUTPUTS: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    INPUT_BLOCK: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Streams in bfloat16 are multiplied with three bfloat16 numbers whose sum each weight is: as exact as float32."""
    part = tl.program_id(1)
    token = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    output = tl.arange(0, OUTPUT_BLOCK)
    place = part * blocks_per_part * INPUT_BLOCK + tl.arange(0, INPUT_BLOCK)
    has_token, has_output = token < num_tokens, output < NUM_OUTPUTS
    streams_ptrs = streams_ptr + token.to(tl.int64)[:, None] * num_inputs
    fn_ptrs = fn_ptr + output[None, :] * num_inputs
    logits = tl.zeros([TOKEN_BLOCK, OUTPUT_BLOCK], tl.float32)
    squares = tl.zeros([TOKEN_BLOCK], tl.float32)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    for block in range(blocks_per_part):
        i = place + block * INPUT_BLOCK
        x = tl.load(streams_ptrs + i[None, :], has_token[:, None] & (i < num_inputs)[None, :], other=0.0)
        weight = tl.load(fn_ptrs + i[:, None], has_output[None, :] & (i < num_inputs)[:, None], other=0.0)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if IS_BFLOAT16:
            first = weight.to(tl.bfloat16)
            rest = weight - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            logits = tl.dot(x, third, acc=logits)
            logits = tl.dot(x, second, acc=logits)
            logits = tl.dot(x, first, acc=logits)
        else:
            logits = tl.dot(wide, weight, acc=logits, input_precision="ieee")
    row = part.to(tl.int64) * num_tokens + token
    tl.store(logit_ptr + row[:, None] * NUM_OUTPUTS + output[None, :], logits, has_token[:, None] & has_output[None, :])
    tl.store(square_ptr + row, squares, has_token)


@triton.jit(**varying("num_parts"))
def _read_kernel(
    streams_ptr,
    logit_ptr,
    square_ptr,
    scale_ptr,
    bias_ptr,
    x_ptr,
    write_ptr,
    mix_ptr,
    num_parts,
    size,
    norm_eps,
    eps,
    NUM: tl.constexpr,
    NUM_BLOCK: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    MIXES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some dims of what a block reads of one token; the first of the token's blocks also says how to write."""
    token = tl.program_id(0).to(tl.int64)
    num_tokens = tl.num_programs(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, NUM_BLOCK)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    streams_ptrs = streams_ptr + (token * NUM + n[:, None]) * size + d[None, :]
    streams = tl.load(streams_ptrs, (n < NUM)[:, None] & (d < size)[None, :], other=0.0).to(tl.float32)

    part = tl.arange(0, PARTS)
    rows = part.to(tl.int64) * num_tokens + token
    square = tl.sum(tl.load(square_ptr + rows, part < num_parts, other=0.0), axis=0)
    factor = tl.rsqrt(square / (NUM * size) + norm_eps)
    logit_ptrs = logit_ptr + rows[:, None] * NUM_OUTPUTS + n[None, :]
    has_logit = (part < num_parts)[:, None] & (n < NUM)[None, :]
    read = tl.sum(tl.load(logit_ptrs, has_logit, other=0.0), axis=0) * factor * tl.load(scale_ptr)
    read = tl.sigmoid(read + tl.load(bias_ptr + n, n < NUM, other=0.0)) + eps
    x = tl.sum(tl.where(n < NUM, read, 0.0)[:, None] * streams, axis=0)
    tl.store(x_ptr + token * size + d, x, d < size)

    if MIXES:  # noqa: SIM102 - known when it is compiled, unlike the next one
        if tl.program_id(1) == 0:
            write = tl.sum(tl.load(logit_ptrs + NUM, has_logit, other=0.0), axis=0) * factor * tl.load(scale_ptr + 1)
            write = 2 * tl.sigmoid(write + tl.load(bias_ptr + NUM + n, n < NUM, other=0.0))
            tl.store(write_ptr + token * NUM + n, write, n < NUM)

            j, k = n[:, None], n[None, :]
            is_inside = (j < NUM) & (k < NUM)
            place = j * NUM + k
            flat = tl.arange(0, NUM_BLOCK * NUM_BLOCK)
            flat_j, flat_k = flat // NUM_BLOCK, flat % NUM_BLOCK
            mix_ptrs = logit_ptr + rows[:, None] * NUM_OUTPUTS + 2 * NUM + (flat_j * NUM + flat_k)[None, :]
            has_mix = (part < num_parts)[:, None] & ((flat_j < NUM) & (flat_k < NUM))[None, :]
            mix = tl.sum(tl.load(mix_ptrs, has_mix, other=0.0), axis=0)
            mix = tl.reshape(mix, (NUM_BLOCK, NUM_BLOCK))
            mix = mix * factor * tl.load(scale_ptr + 2) + tl.load(bias_ptr + 2 * NUM + place, is_inside, other=0.0)
            mix = tl.where(is_inside, mix, float("-inf"))
            mix = tl.exp(mix - tl.max(tl.where(j < NUM, mix, 0.0), axis=1)[:, None])
            mix = tl.where(is_inside, mix, 0.0)
            mix = tl.where(is_inside, mix / tl.where(j < NUM, tl.sum(mix, axis=1)[:, None], 1.0) + eps, 0.0)
            mix = mix / tl.where(k < NUM, tl.sum(mix, axis=0)[None, :] + eps, 1.0)
            for _ in range(NUM_ITERATIONS - 1):
                mix = mix / tl.where(j < NUM, tl.sum(mix, axis=1)[:, None] + eps, 1.0)
                mix = mix / tl.where(k < NUM, tl.sum(mix, axis=0)[None, :] + eps, 1.0)
            tl.store(mix_ptr + token * NUM * NUM + place, mix, is_inside)


@triton.jit
def _write_kernel(
    streams_ptr,
    output_ptr,
    write_ptr,
    mix_ptr,
    out_ptr,
    size,
    NUM: tl.constexpr,
    NUM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, NUM_BLOCK)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    write = tl.load(write_ptr + token * NUM + k, k < NUM, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + token * size + d, d < size, other=0.0).to(tl.float32)
    total = write[:, None] * output[None, :]
    for j in tl.static_range(NUM):
        mix = tl.load(mix_ptr + (token * NUM + j) * NUM + k, k < NUM, other=0.0).to(tl.float32)
        stream = tl.load(streams_ptr + (token * NUM + j) * size + d, d < size, other=0.0).to(tl.float32)
        total += mix[:, None] * stream[None, :]
    out_ptrs = out_ptr + (token * NUM + k[:, None]) * size + d[None, :]
    tl.store(out_ptrs, total, (k < NUM)[:, None] & (d < size)[None, :])
