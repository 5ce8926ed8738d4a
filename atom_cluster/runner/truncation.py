"""top-k and top-p: the few tokens that stay in a draw. Pure functions on logits; knows no rows and no randomness."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.runner.host_tensors import on_device

_FIRST_CANDIDATES = 256
"""Most likely tokens looked at first by top-p. Sorting a whole vocabulary costs thirty times as much on a CPU."""
_CANDIDATES_GROWTH = 16


def truncate(
    logits_RV: torch.Tensor, *, top_k: Sequence[int], top_p: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, K] and token ids [R, K] int32 of candidates, most likely first; removed ones have -inf.

    logits_RV: float32, divided by temperature. Each row has a `top_k` in (0, V) or a `top_p` below 1; 0 and 1 keep
    everything. top-k keeps exactly k tokens. top-p then keeps a token while the mass of the likelier ones, among what
    top-k left, is below p; so the most likely token always stays.
    """
    vocab_size = logits_RV.shape[-1]
    ks = [k if 0 < k < vocab_size else vocab_size for k in top_k]
    num_candidates = max(ks)
    if num_candidates == vocab_size and logits_RV.device.type == "cpu":  # a GPU sorts faster than the host can decide
        num_candidates = min(vocab_size, max([_FIRST_CANDIDATES, *(k for k in ks if k < vocab_size)]))
    values, token_ids, is_enough = _keep(logits_RV, ks, top_p, num_candidates=num_candidates)
    while num_candidates < max(ks) and not bool(is_enough.all()):
        num_candidates = min(num_candidates * _CANDIDATES_GROWTH, vocab_size)
        values, token_ids, is_enough = _keep(logits_RV, ks, top_p, num_candidates=num_candidates)
    return values, token_ids


def _keep(
    logits_RV: torch.Tensor, ks: list[int], top_p: Sequence[float], *, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Also whether each row's candidates hold all tokens that it keeps, [R, 1] bool."""
    device = logits_RV.device
    values, token_ids = logits_RV.topk(num_candidates, dim=-1)
    k_R1 = on_device(ks, torch.int64, device).unsqueeze(-1)
    top_p_R1 = on_device(top_p, torch.float32, device).unsqueeze(-1)
    values = values.masked_fill(torch.arange(num_candidates, device=device) >= k_R1, float("-inf"))
    has_k = k_R1 < logits_RV.shape[-1]
    log_mass = torch.where(has_k, values.logsumexp(-1, keepdim=True), logits_RV.logsumexp(-1, keepdim=True))
    mass = (values - log_mass).exp_().cumsum(dim=-1)
    # Rounding may leave a row's whole mass just below a top_p of 1: never cut there.
    is_cut = (mass[:, :-1] >= top_p_R1) & (top_p_R1 < 1.0)
    values[:, 1:].masked_fill_(is_cut, float("-inf"))
    return values, token_ids.to(torch.int32), (k_R1 <= num_candidates) | (mass[:, -1:] >= top_p_R1)
