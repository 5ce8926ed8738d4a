"""Repetition, presence and frequency penalties of one row, from the tokens it has. Pure functions, nothing remembered.

Only logits of tokens that the row has are touched, so the cost does not grow with the vocabulary, and nothing waits for
a device: the tokens are where the previous step left them.
"""

from __future__ import annotations

import torch

from atom_cluster.messages.requests import SamplingParams


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether logits depend on earlier tokens."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def penalize(logits_V: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, sampling: SamplingParams) -> None:
    """Change `logits_V` (float32) in place, in vLLM's order: repetition, frequency, presence.

    token_ids: [N] integers on the same device, the prompt and then the output so far.
    """
    seen = token_ids.to(torch.int64)
    if sampling.repetition_penalty != 1.0:
        logits = logits_V[seen]
        factor = sampling.repetition_penalty
        logits_V[seen] = torch.where(logits > 0, logits / factor, logits * factor)
    output = seen[num_prompt_tokens:]
    if len(output) and (sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0):
        counts_V = torch.zeros_like(logits_V).index_add_(0, output, torch.ones_like(output, dtype=logits_V.dtype))
        # A token that occurs twice is written twice, with the same value.
        logits_V[output] = logits_V[output] - sampling.frequency_penalty * counts_V[output] - sampling.presence_penalty
