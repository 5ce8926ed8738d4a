"""Masks of structured output: every logit looks up its bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.runtime import varying

_BLOCK = 2048


def mask(
    logits_SV: torch.Tensor, masks_MW: torch.Tensor, index_S: torch.Tensor, *, first_token_id: int
) -> torch.Tensor:
    """See `ops.sampling.MaskLogits`."""
    num_samples, vocab_size = logits_SV.shape
    out_SV = torch.empty(num_samples, vocab_size, dtype=torch.float32, device=logits_SV.device)
    if out_SV.numel():
        _mask_kernel[(num_samples, triton.cdiv(vocab_size, _BLOCK))](
            logits_SV,
            logits_SV.stride(0),
            masks_MW,
            masks_MW.shape[1],
            index_S,
            out_SV,
            vocab_size,
            first_token_id,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out_SV


@triton.jit(**varying("index_ptr"))
def _mask_kernel(
    logits_ptr, stride, masks_ptr, num_words, index_ptr, out_ptr, vocab_size, first_token_id, BLOCK: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < vocab_size
    logit = tl.load(logits_ptr + sample * stride + column, is_inside, other=0.0).to(tl.float32)
    index = tl.load(index_ptr + sample)
    if index >= 0:
        token = first_token_id + column
        word = tl.load(masks_ptr + index * num_words + token // 32, is_inside & (token < 32 * num_words), other=0)
        logit = tl.where(((word >> (token % 32)) & 1) != 0, logit, float("-inf"))
    tl.store(out_ptr + sample * vocab_size + column, logit, is_inside)
