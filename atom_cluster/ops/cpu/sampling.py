"""Choice of tokens on CPUs: row by row, each with just the work that it asks for."""

from __future__ import annotations

import torch

from atom_cluster.ops.sampling import Column, Draw, SamplingTensors
from atom_cluster.ops.torch_ref.noise import exponential_noise, noise_keys

_FIRST_CANDIDATES = 256
"""Most likely tokens looked at first by top-p. Sorting a whole vocabulary costs thirty times as much."""
_CANDIDATES_GROWTH = 16


def sample(
    logits_SV: torch.Tensor, row_S: torch.Tensor, position_S: torch.Tensor, params: SamplingTensors, *, draw: Draw
) -> torch.Tensor:
    """See `ops.sampling.SampleTokens`."""
    if draw is Draw.GREEDY or not len(logits_SV):
        return logits_SV.argmax(dim=-1)
    values_SC = params.values[row_S]
    output_position_S = position_S.to(torch.int32) - values_SC[:, Column.NUM_PROMPT_TOKENS]
    key_S2 = noise_keys(values_SC[:, Column.SEED_LOW : Column.SEED_HIGH + 1], output_position_S)
    rows = zip(logits_SV, values_SC.tolist(), values_SC.view(torch.float32).tolist(), key_S2[:, None])
    vocab = torch.arange(logits_SV.shape[1], dtype=torch.int32)
    return torch.stack([_choose(*row, vocab) for row in rows])


def adjust(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """See `ops.sampling.AdjustLogits`. Only logits of tokens that a row has or names are touched."""
    logits_SV = logits_SV.to(torch.float32, copy=True)
    values_SC = params.values[row_S]
    floats_SC = values_SC.view(torch.float32)
    rows = zip(logits_SV, row_S.tolist(), position_S.tolist(), values_SC.tolist(), floats_SC.tolist())
    for logits_V, row, position, values_C, floats_C in rows:
        num_prompt_tokens = values_C[Column.NUM_PROMPT_TOKENS]
        if position - num_prompt_tokens < values_C[Column.MIN_TOKENS]:
            endings = params.endings[row, : values_C[Column.NUM_ENDINGS]]
            logits_V[endings[endings < len(logits_V)].to(torch.int64)] = float("-inf")
        _penalize(
            logits_V,
            tokens[row, :position].to(torch.int64),
            num_prompt_tokens=num_prompt_tokens,
            repetition=floats_C[Column.REPETITION],
            frequency=floats_C[Column.FREQUENCY],
            presence=floats_C[Column.PRESENCE],
        )
        biases = params.biases[row, : values_C[Column.NUM_BIASES]]
        biases = biases[(biases[:, 0] >= 0) & (biases[:, 0] < len(logits_V))]
        logits_V[biases[:, 0].to(torch.int64)] += biases[:, 1].contiguous().view(torch.float32)
    return logits_SV


def _penalize(
    logits_V: torch.Tensor,
    seen: torch.Tensor,
    *,
    num_prompt_tokens: int,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """In place. A token that occurs twice is written twice, with the same value."""
    if repetition != 1.0:
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / repetition, logits * repetition)
    output = seen[num_prompt_tokens:]
    if len(output) and (frequency != 0.0 or presence != 0.0):
        counts_V = torch.zeros_like(logits_V).index_add_(0, output, torch.ones_like(output, dtype=logits_V.dtype))
        logits_V[output] = logits_V[output] - frequency * counts_V[output] - presence


def _choose(
    logits_V: torch.Tensor, values_C: list[int], floats_C: list[float], key_12: torch.Tensor, vocab: torch.Tensor
) -> torch.Tensor:
    """The token of one row, int64 without dimensions."""
    scale = floats_C[Column.INVERSE_TEMPERATURE]
    if scale == 0.0:
        return logits_V.argmax()
    scaled_V = logits_V.to(torch.float32) * scale
    log_min_p, top_k, top_p = floats_C[Column.LOG_MIN_P], values_C[Column.TOP_K], floats_C[Column.TOP_P]
    if log_min_p > float("-inf"):
        scaled_V.masked_fill_(scaled_V < scaled_V.max() + log_min_p, float("-inf"))
    if top_k >= len(scaled_V):
        top_k = 0
    if not top_k and top_p >= 1.0:
        return scaled_V.sub_(exponential_noise(key_12, vocab)[0].log_()).argmax()
    kept_K, token_ids_K = _truncate(scaled_V, top_k=top_k, top_p=top_p)
    noise_K = exponential_noise(key_12, token_ids_K.to(torch.int32))[0]
    score_K = kept_K - noise_K.log_()
    return token_ids_K.masked_fill(score_K < score_K.max(), len(scaled_V)).min()


def _truncate(scaled_V: torch.Tensor, *, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of the tokens that top-k and top-p leave, most likely first."""
    vocab_size = len(scaled_V)
    num_candidates = min(vocab_size, top_k + 1 if top_k else _FIRST_CANDIDATES)
    while True:
        values, token_ids = scaled_V.topk(num_candidates)
        num_kept = _num_kept(values, scaled_V, top_k=top_k, top_p=top_p)
        if num_kept < num_candidates or num_candidates == vocab_size:
            break
        num_candidates = min(num_candidates * _CANDIDATES_GROWTH, vocab_size)
    kept, kept_ids = values[:num_kept], token_ids[:num_kept]
    if num_kept < num_candidates and values[num_kept] == kept[-1]:
        # Which ones of those that tie are among the first is left open by `topk`; we keep the lowest ids.
        num_above = int((kept > kept[-1]).sum())
        tied_ids = (scaled_V == kept[-1]).nonzero()[: num_kept - num_above, 0]
        kept_ids = torch.cat((kept_ids[:num_above], tied_ids))
    return kept, kept_ids


def _num_kept(values: torch.Tensor, scaled_V: torch.Tensor, *, top_k: int, top_p: float) -> int:
    """How many of the most likely tokens stay; all of `values` if it may be more."""
    if top_k:
        values = values[:top_k]
    if top_p >= 1.0:
        return len(values)
    mass = (values - (values if top_k else scaled_V).logsumexp(0)).exp_().cumsum(dim=0)
    return min(len(values), 1 + int((mass < top_p).sum()))
