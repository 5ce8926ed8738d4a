"""Penalties and masked endings: tokens are counted into a table of the vocabulary, then all logits pass by it; biases,
of which there are few, come behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.sampling import NUM_COLUMNS, Column, SamplingTensors
from atom_cluster.ops.triton.runtime import varying

_COLUMNS = tl.constexpr(int(NUM_COLUMNS))
_NUM_PROMPT_TOKENS = tl.constexpr(int(Column.NUM_PROMPT_TOKENS))
_MIN_TOKENS = tl.constexpr(int(Column.MIN_TOKENS))
_REPETITION = tl.constexpr(int(Column.REPETITION))
_FREQUENCY = tl.constexpr(int(Column.FREQUENCY))
_PRESENCE = tl.constexpr(int(Column.PRESENCE))
_NUM_ENDINGS = tl.constexpr(int(Column.NUM_ENDINGS))
_NUM_BIASES = tl.constexpr(int(Column.NUM_BIASES))

# A count has the number of times that a token is in the output, and two flags.
_TIMES = tl.constexpr((1 << 29) - 1)
_IS_ENDING = tl.constexpr(1 << 29)
_IN_PROMPT = tl.constexpr(1 << 30)

_BLOCK = 2048


def adjust(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """See `ops.sampling.AdjustLogits`."""
    num_samples, vocab_size = logits_SV.shape
    out_SV = torch.empty(num_samples, vocab_size, dtype=torch.float32, device=logits_SV.device)
    if not num_samples:
        return out_SV
    count_SV = torch.zeros(num_samples, vocab_size, dtype=torch.int32, device=logits_SV.device)
    # Blocks of positions first in the grid's second dimension: those behind a row's tokens end at once.
    _count_kernel[(num_samples, triton.cdiv(tokens.shape[1], _BLOCK))](
        row_S,
        position_S,
        params.values,
        params.endings,
        params.endings.shape[1],
        tokens,
        tokens.stride(0),
        count_SV,
        vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _adjust_kernel[(num_samples, triton.cdiv(vocab_size, _BLOCK))](
        logits_SV,
        logits_SV.stride(0),
        row_S,
        params.values,
        count_SV,
        out_SV,
        vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    if params.biases.shape[1]:
        _bias_kernel[(num_samples,)](
            row_S, params.values, params.biases, params.biases.stride(0), out_SV, vocab_size, BLOCK=256, num_warps=4
        )
    return out_SV


@triton.jit(**varying("row_ptr", "position_ptr"))
def _count_kernel(
    row_ptr,
    position_ptr,
    values_ptr,
    endings_ptr,
    endings_stride,
    tokens_ptr,
    tokens_stride,
    count_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + sample)
    start = tl.program_id(1) * BLOCK
    row = tl.load(row_ptr + sample)
    count_ptr += sample * vocab_size
    values_ptr += row * _COLUMNS
    num_prompt_tokens = tl.load(values_ptr + _NUM_PROMPT_TOKENS)
    lane = tl.arange(0, BLOCK)
    if start < position:
        index = start + lane
        token_id = tl.load(tokens_ptr + row * tokens_stride + index, index < position, other=-1)
        is_inside = (token_id >= 0) & (token_id < vocab_size)
        tl.atomic_add(count_ptr + token_id, 1, is_inside & (index >= num_prompt_tokens), sem="relaxed")
        tl.atomic_or(count_ptr + token_id, _IN_PROMPT, is_inside & (index < num_prompt_tokens), sem="relaxed")
    if (start == 0) & (position - num_prompt_tokens < tl.load(values_ptr + _MIN_TOKENS)):
        num_endings = tl.load(values_ptr + _NUM_ENDINGS)
        for first in range(0, num_endings, BLOCK):
            index = first + lane
            token_id = tl.load(endings_ptr + row * endings_stride + index, index < num_endings, other=-1)
            is_inside = (token_id >= 0) & (token_id < vocab_size)
            tl.atomic_or(count_ptr + token_id, _IS_ENDING, is_inside, sem="relaxed")


@triton.jit(**varying("row_ptr"))
def _adjust_kernel(logits_ptr, stride, row_ptr, values_ptr, count_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < vocab_size
    logit = tl.load(logits_ptr + sample * stride + index, is_inside, other=0.0).to(tl.float32)
    count = tl.load(count_ptr + sample * vocab_size + index, is_inside, other=0)
    values_ptr += tl.load(row_ptr + sample) * _COLUMNS
    repetition = tl.load(values_ptr + _REPETITION).to(tl.float32, bitcast=True)
    frequency = tl.load(values_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
    presence = tl.load(values_ptr + _PRESENCE).to(tl.float32, bitcast=True)
    num_output = count & _TIMES
    logit = tl.where((count & _IS_ENDING) != 0, float("-inf"), logit)
    repeated = tl.where(logit > 0.0, logit / repetition, logit * repetition)
    logit = tl.where((num_output | (count & _IN_PROMPT)) > 0, repeated, logit)
    logit = tl.where(num_output > 0, logit - frequency * num_output.to(tl.float32) - presence, logit)
    tl.store(out_ptr + sample * vocab_size + index, logit, is_inside)


@triton.jit(**varying("row_ptr"))
def _bias_kernel(row_ptr, values_ptr, biases_ptr, biases_stride, out_ptr, vocab_size, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + sample)
    num_biases = tl.load(values_ptr + row * _COLUMNS + _NUM_BIASES)
    biases_ptr += row * biases_stride
    out_ptr += sample * vocab_size
    for first in range(0, num_biases, BLOCK):
        index = first + tl.arange(0, BLOCK)
        token_id = tl.load(biases_ptr + 2 * index, index < num_biases, other=-1)
        bias = tl.load(biases_ptr + 2 * index + 1, index < num_biases, other=0).to(tl.float32, bitcast=True)
        is_inside = (token_id >= 0) & (token_id < vocab_size)
        logit = tl.load(out_ptr + token_id, is_inside, other=0.0)
        tl.store(out_ptr + token_id, logit + bias, is_inside)
