"""Choice of tokens: rows are cut into parts, one program each; then the parts' winners race against each other.

Parts leave keys whose order is that of scores, then of lower ids. Rows that truncate leave their likeliest token only,
for `sampling_truncated.py`, which draws for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.sampling import NO_KEY, Draw, SamplingTensors
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.runtime import varying
from atom_cluster.ops.triton.sampling_noise import (
    load_key,
    load_limits,
    load_row,
    minus_log_exponential,
    uniform,
)
from atom_cluster.ops.triton.sampling_truncated import FEWEST_PARTS, choose_truncated

_BLOCK = 1024
_PROGRAMS_PER_MULTIPROCESSOR = 8


def sample(
    logits_SV: torch.Tensor, row_S: torch.Tensor, position_S: torch.Tensor, params: SamplingTensors, *, draw: Draw
) -> torch.Tensor:
    """See `ops.sampling.SampleTokens`."""
    key_SI = _race_parts(logits_SV, row_S, position_S, params, draw=draw, first_token_id=0)
    if draw is Draw.TRUNCATED:
        return choose_truncated(logits_SV, row_S, position_S, params, key_SI)
    return _winners(key_SI, keeps_keys=False)


def race(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    *,
    draw: Draw,
    first_token_id: int,
) -> torch.Tensor:
    """See `ops.sampling.RaceTokens`."""
    if logits_SV.shape[1] == 0:
        return torch.full_like(row_S, NO_KEY)
    key_SI = _race_parts(logits_SV, row_S, position_S, params, draw=draw, first_token_id=first_token_id)
    return _winners(key_SI, keeps_keys=True)


def _race_parts(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    *,
    draw: Draw,
    first_token_id: int,
) -> torch.Tensor:
    """The key of each part of each row, [S, I] int64."""
    num_samples, vocab_size = logits_SV.shape
    num_programs = _PROGRAMS_PER_MULTIPROCESSOR * runtime.num_multiprocessors(logits_SV.device)
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    part_size = _BLOCK * triton.cdiv(num_blocks, max(1, num_programs // max(1, num_samples)))
    num_parts = triton.cdiv(vocab_size, part_size)
    key_SI = row_S.new_empty(num_samples, num_parts)
    if num_samples:
        _race_kernel[(num_samples, num_parts)](
            logits_SV,
            logits_SV.stride(0),
            row_S,
            position_S,
            params.values,
            key_SI,
            vocab_size,
            part_size,
            first_token_id,
            RANDOM=draw >= Draw.RANDOM,
            PTX=not (runtime.INTERPRETED or runtime.is_hip()),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return key_SI


def _winners(key_SI: torch.Tensor, *, keeps_keys: bool) -> torch.Tensor:
    """The largest key of each row, or the token that it names, [S] int64."""
    num_samples, num_parts = key_SI.shape
    out_S = key_SI.new_empty(num_samples)
    if num_samples:
        _winner_kernel[(num_samples,)](
            key_SI,
            out_S,
            num_parts,
            PARTS=max(FEWEST_PARTS, triton.next_power_of_2(num_parts)),
            KEEPS_KEYS=keeps_keys,
            num_warps=1,
        )
    return out_S


@triton.jit(**varying("row_ptr", "position_ptr"))
def _race_kernel(
    logits_ptr,
    stride,
    row_ptr,
    position_ptr,
    values_ptr,
    key_ptr,
    vocab_size,
    part_size,
    first_token_id,
    RANDOM: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * part_size
    stop = tl.minimum(start + part_size, vocab_size)
    logits_ptr += sample * stride
    if RANDOM:
        row_values_ptr, scale = load_row(row_ptr, values_ptr, sample)
        _, _, _, is_truncated = load_limits(row_values_ptr)
        if (scale > 0.0) & (is_truncated == 0):
            key_low, key_high = load_key(row_values_ptr, position_ptr, sample)
            best, best_id = _race(logits_ptr, start, stop, scale, key_low, key_high, first_token_id, PTX, BLOCK)
        else:
            best, best_id = _likeliest(logits_ptr, start, stop, BLOCK)
    else:
        best, best_id = _likeliest(logits_ptr, start, stop, BLOCK)
    bits = tl.where(best == 0.0, 0.0, best).to(tl.int32, bitcast=True)  # one zero, not two
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (ordered << 32) | (0xFFFFFFFF - (best_id + first_token_id).to(tl.int64))
    tl.store(key_ptr + sample * tl.num_programs(1) + tl.program_id(1), key)


@triton.jit
def _race(logits_ptr, start, stop, scale, key_low, key_high, first_token_id, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """The highest score of tokens in [start, stop), and the first one that has it."""
    lane_id = start + tl.arange(0, BLOCK)
    lane_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK):
        index = first + tl.arange(0, BLOCK)
        scaled = tl.load(logits_ptr + index, index < stop, other=float("-inf")).to(tl.float32) * scale
        score = scaled + minus_log_exponential(uniform(index + first_token_id, key_low, key_high), PTX)
        lane_id = tl.where(score > lane_best, index, lane_id)
        lane_best = tl.maximum(score, lane_best)
    best = tl.max(lane_best)
    return best, tl.min(tl.where(lane_best == best, lane_id, stop - 1))


@triton.jit
def _likeliest(logits_ptr, start, stop, BLOCK: tl.constexpr):
    """The highest logit of tokens in [start, stop), and the first one that has it."""
    lane_id = start + tl.arange(0, BLOCK)
    lane_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK):
        index = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + index, index < stop, other=float("-inf")).to(tl.float32)
        lane_id = tl.where(logit > lane_best, index, lane_id)
        lane_best = tl.maximum(logit, lane_best)
    best = tl.max(lane_best)
    return best, tl.min(tl.where(lane_best == best, lane_id, stop - 1))


@triton.jit(**varying("num_parts"))
def _winner_kernel(key_ptr, out_ptr, num_parts, PARTS: tl.constexpr, KEEPS_KEYS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    key = tl.max(tl.load(key_ptr + sample * num_parts + part, part < num_parts, other=-(2**63)))
    tl.store(out_ptr + sample, key if KEEPS_KEYS else 0xFFFFFFFF - (key & 0xFFFFFFFF))
