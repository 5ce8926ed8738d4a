"""Stop 12 of 14: logits become one token per row. Next: atom_cluster/engine/core.py, and kv_transfer/handoff.py.

Pure functions: nothing is kept between steps.

Order, the same as vLLM's: log probabilities are taken from the raw logits; then end tokens are masked while
`min_tokens` is not reached, penalties, temperature, min-p, top-k, top-p, draw. (Transformers differs in one point: its
min-p comes last.) The draw is the exponential race (argmax of p / e, e exponential; the same as Gumbel-max): exact, and
insensitive to tiny differences of logits between batch shapes unless two tokens nearly tie. Greedy rows never see
noise; batches of plain greedy rows cost one argmax. Knows no model, no blocks and no stop conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atom_cluster.messages.requests import SamplingParams, TokenLogprobs, TopLogprob
from atom_cluster.runner.host_tensors import on_device, send
from atom_cluster.runner.noise import exponential_noise, noise_keys
from atom_cluster.runner.penalties import has_penalties, penalize
from atom_cluster.runner.row_state import Row
from atom_cluster.runner.truncation import truncate

SMALLEST_TEMPERATURE = 1e-5
"""Below it a row counts as greedy: logits divided by less overflow, and the race is decided anyway."""

_ROWS_PER_DRAW_ON_CPU = 1
"""A row of logits fits a core's cache; several passes over many rows at once would go to memory each time."""


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log probabilities of one step, on their way to the host."""

    samplings: tuple[SamplingParams, ...]
    chosen: torch.Tensor
    """[S] float32 in host memory: of the sampled tokens."""
    top_ids: torch.Tensor
    """[S, K] int64 in host memory, most likely first; K is the most that any row asked for."""
    top: torch.Tensor
    """[S, K] float32 in host memory."""

    def read(self) -> tuple[TokenLogprobs | None, ...]:
        """One per row, None where not asked for. The device must have finished the step."""
        chosen, top_ids, top = self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist()
        found: list[TokenLogprobs | None] = []
        for i, sampling in enumerate(self.samplings):
            if sampling.logprobs is None:
                found.append(None)
                continue
            pairs = zip(top_ids[i][: sampling.logprobs], top[i])
            found.append(TokenLogprobs(chosen[i], tuple(TopLogprob(token_id, logprob) for token_id, logprob in pairs)))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What the sampler chose."""

    token_ids: torch.Tensor
    """[S] int64 on the logits' device."""
    logprobs: LogprobTensors | None
    """None when no row asked for any."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """A row that samples in this step."""

    row: Row
    index: int
    """Its number in the table of tokens."""
    num_tokens: int
    """Tokens that it has, not counting the one to be sampled."""

    @property
    def output_position(self) -> int:
        """Index of the new token among the request's output tokens."""
        return self.num_tokens - self.row.num_prompt_tokens


def is_plain_greedy(sampling: SamplingParams) -> bool:
    """Whether the next token is the argmax of the raw logits and nothing else is wanted."""
    return (
        sampling.temperature < SMALLEST_TEMPERATURE
        and sampling.logprobs is None
        and sampling.min_tokens == 0
        and not has_penalties(sampling)
    )


def sample(logits_SV: torch.Tensor, rows: Sequence[SamplingRow], *, tokens: torch.Tensor) -> SampledBatch:
    """Choose one token per row. `logits_SV` is float32 and may be overwritten.

    tokens: [num_rows, L] integers on the same device, what each row of the table has so far.
    """
    if all(is_plain_greedy(item.row.sampling) for item in rows):
        return SampledBatch(logits_SV.argmax(dim=-1), None)
    samplings = tuple(item.row.sampling for item in rows)
    wants_logprobs = any(sampling.logprobs is not None for sampling in samplings)
    raw_SV = logits_SV.clone() if wants_logprobs else logits_SV
    for logits_V, item in zip(logits_SV, rows):
        _adjust(logits_V, item, tokens)
    positions = np.array([[item.output_position] for item in rows])
    key_S2 = send(noise_keys([item.row.seed for item in rows], positions)[:, 0], logits_SV.device)
    token_ids = choose(logits_SV, samplings, key_S2)
    return SampledBatch(token_ids, gather_logprobs(raw_SV, token_ids, samplings) if wants_logprobs else None)


def choose(logits_SV: torch.Tensor, samplings: Sequence[SamplingParams], key_S2: torch.Tensor) -> torch.Tensor:
    """One token per row by temperature, min-p, top-k and top-p, [S] int64; the most likely one of greedy rows.

    key_S2: `noise_keys` of the draws, on the logits' device.
    """
    is_random = [sampling.temperature >= SMALLEST_TEMPERATURE for sampling in samplings]
    if all(is_random):
        token_ids = torch.empty(len(samplings), dtype=torch.int64, device=logits_SV.device)
    else:
        token_ids = logits_SV.argmax(dim=-1)
    for group in _groups([i for i in range(len(samplings)) if is_random[i]], samplings, logits_SV):
        index = on_device(group, torch.int64, logits_SV.device)
        token_ids[index] = _draw(logits_SV[index], [samplings[i] for i in group], key_S2[index])
    return token_ids


def gather_logprobs(
    logits_SV: torch.Tensor, token_ids: torch.Tensor, samplings: tuple[SamplingParams, ...]
) -> LogprobTensors:
    """Log probability of each row's token and of its most likely alternatives, from raw logits, without a full sort."""
    num_top = min(max(s.logprobs or 0 for s in samplings), logits_SV.shape[-1])
    log_mass = logits_SV.logsumexp(dim=-1, keepdim=True)
    chosen = (logits_SV.gather(-1, token_ids.unsqueeze(-1)) - log_mass).squeeze(-1)
    top = logits_SV.topk(num_top, dim=-1)
    return LogprobTensors(
        samplings=samplings,
        chosen=chosen.to("cpu", non_blocking=True),
        top_ids=top.indices.to("cpu", non_blocking=True),
        top=(top.values - log_mass).to("cpu", non_blocking=True),
    )


def _adjust(logits_V: torch.Tensor, item: SamplingRow, tokens: torch.Tensor) -> None:
    """Mask end tokens and apply penalties, in place."""
    row = item.row
    if item.output_position < row.sampling.min_tokens and row.ending_token_ids:
        endings = [token_id for token_id in row.ending_token_ids if token_id < logits_V.shape[-1]]
        logits_V[on_device(endings, torch.int64, logits_V.device)] = float("-inf")
    if has_penalties(row.sampling):
        penalize(logits_V, tokens[item.index, : item.num_tokens], row.num_prompt_tokens, row.sampling)


def _groups(random: list[int], samplings: Sequence[SamplingParams], logits_SV: torch.Tensor) -> list[list[int]]:
    """Rows to draw for together: those that look at the whole vocabulary, and those that need few candidates."""
    truncated = [i for i in random if _is_truncated(samplings[i], logits_SV.shape[-1])]
    whole = [i for i in random if not _is_truncated(samplings[i], logits_SV.shape[-1])]
    rows_per_group = _ROWS_PER_DRAW_ON_CPU if logits_SV.device.type == "cpu" else len(samplings)
    return [
        kind[first : first + rows_per_group]
        for kind in (whole, truncated)
        for first in range(0, len(kind), rows_per_group)
    ]


def _is_truncated(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _draw(logits_RV: torch.Tensor, samplings: Sequence[SamplingParams], key_R2: torch.Tensor) -> torch.Tensor:
    """One random token per row, [R] int64, from penalized logits of one of `_groups`."""
    device, vocab_size = logits_RV.device, logits_RV.shape[-1]
    temperature = on_device([[s.temperature] for s in samplings], torch.float32, device)
    # With the maximum moved to 0, a small temperature cannot overflow, and min-p is a fixed threshold.
    logits_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperature)
    if any(s.min_p > 0.0 for s in samplings):
        floor = on_device([[s.min_p] for s in samplings], torch.float32, device).log_()
        logits_RV = logits_RV.masked_fill_(logits_RV < floor, float("-inf"))
    if not _is_truncated(samplings[0], vocab_size):
        noise = exponential_noise(key_R2, torch.arange(vocab_size, dtype=torch.int32, device=device))
        return logits_RV.sub_(noise.log_()).argmax(dim=-1)
    logits_RK, token_ids_RK = truncate(
        logits_RV, top_k=[s.top_k for s in samplings], top_p=[s.top_p for s in samplings]
    )
    winners = (logits_RK - exponential_noise(key_R2, token_ids_RK).log_()).argmax(dim=-1, keepdim=True)
    return token_ids_RK.gather(-1, winners).squeeze(-1).to(torch.int64)
