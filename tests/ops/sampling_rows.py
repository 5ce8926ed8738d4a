"""Rows that ask for all kinds of sampling, and what each must get, worked out one by one in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops.sampling import SamplingTensors
from atom_cluster.ops.torch_ref.noise import exponential_noise, noise_keys, seed_words
from atom_cluster.runner.sampling_table import SMALLEST_TEMPERATURE, SamplingTable

KINDS = (
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 0.0, "top_k": 7, "top_p": 0.1},
    {"temperature": 2.0, "top_k": 100_000},
    {"temperature": 1.5, "top_k": 90, "top_p": 0.97},
    {"temperature": 0.02, "top_p": 0.999},
    {"temperature": 3.0, "top_p": 0.5},
    {"temperature": 5.0, "top_k": 250, "min_p": 0.3},
    {"top_p": 1e-6},
    {"top_k": 1},
)


def samplings(count: int) -> list[SamplingParams]:
    """Kinds in turn, with different seeds."""
    return [SamplingParams(**KINDS[i % len(KINDS)], seed=1000 + i) for i in range(count)]


def tensors_of(
    rows: Sequence[SamplingParams],
    *,
    num_prompt_tokens: int = 1,
    endings: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> SamplingTensors:
    """A table of these rows."""
    table = SamplingTable(num_rows=len(rows), device=torch.device(device))
    for row, sampling in enumerate(rows):
        ending = endings[row] if endings else ()
        table.fill(row, sampling, num_prompt_tokens=num_prompt_tokens, ending_token_ids=ending)
    table.flush()
    return table.tensors


def expected_scores(logits: torch.Tensor, sampling: SamplingParams, output_position: int) -> torch.Tensor:
    """[V] float64: -inf for tokens that were removed. The winner has the highest."""
    logits = logits.cpu().double()
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return logits
    scaled = (logits.float() * torch.tensor(1.0 / sampling.temperature, dtype=torch.float32)).double()
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token].item(), token))
    mass = scaled.softmax(0)
    kept = [token for token in order if mass[token] >= sampling.min_p * mass.max()]
    kept = kept[: sampling.top_k] if sampling.top_k else kept
    likeliest = torch.tensor(kept)
    share = mass[likeliest] / mass[likeliest].sum()
    if sampling.top_p < 1.0:
        likeliest = likeliest[share.cumsum(0) - share < sampling.top_p]
    key = noise_keys(
        torch.tensor([seed_words(sampling.seed or 0)], dtype=torch.int32), torch.tensor([output_position]).int()
    )
    noise = exponential_noise(key, torch.arange(len(scaled), dtype=torch.int32))[0].double()
    scores = torch.full_like(scaled, float("-inf"))
    scores[likeliest] = (scaled - noise.log())[likeliest]
    return scores


def is_winner(scores: torch.Tensor, token_id: int, *, tolerance: float = 1e-4) -> bool:
    """Whether the token wins, or loses by rounding only."""
    return bool(scores[token_id] >= scores.max() - tolerance)
