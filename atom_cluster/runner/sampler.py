"""Stop 12 of 14: logits become one token per row. Next: atom_cluster/engine/core.py, and kv_transfer/handoff.py.

Nothing is kept between steps, and nothing waits for the device: what rows ask for lies there (`SamplingTable`).

Order, almost vLLM's: log probabilities are taken from the raw logits; then end tokens are masked while
`min_tokens` is not reached, penalties, biases, masks of grammars, temperature, min-p, top-k, top-p, draw. (vLLM adds
biases before penalties; Transformers has min-p last.) The draw is the exponential race (argmax of p / e, e exponential;
the same as Gumbel-max): exact, and insensitive to tiny differences of logits between batch shapes unless two tokens
nearly tie. Greedy rows never see noise; batches of plain greedy rows cost one argmax. Knows no model, no blocks and no
stop conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from atom_cluster.layers.logits import Logits
from atom_cluster.messages.requests import SamplingParams, TokenLogprobs, TopLogprob
from atom_cluster.ops.sampling import Draw, SamplingTensors, winners
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.collectives import all_reduce_max
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampling_table import adjusts, draw_of, needs_all_logits


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
    """What the sampler chose. S as in `Samples`."""

    token_ids: torch.Tensor
    """[S] int64 on the logits' device."""
    logprobs: LogprobTensors | None
    """On rank 0, of the samples that stand for a request; None when none asked for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Where a batch's tokens go, and what is wanted of them."""

    row: torch.Tensor
    """[S] int64 on the device: row of the table."""
    position: torch.Tensor
    """[S] int64 on the device: position that the token will have in it."""
    samplings: tuple[SamplingParams, ...]
    """Of the first samples; those behind stand for no request."""

    @property
    def draw(self) -> Draw:
        """What it takes to choose the tokens."""
        return max((draw_of(sampling) for sampling in self.samplings), default=Draw.GREEDY)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Tokens that samples may choose from. M masks of W words; S samples, those that stand for no request included."""

    words: torch.Tensor
    """[M, W] int32 on the device: see `ops.sampling.MaskLogits`."""
    index: torch.Tensor
    """[S] int64 on the device: each sample's mask, -1 for none."""

    def apply(self, logits: Logits, ops: OpTable) -> Logits:
        """Each rank masks its own part."""
        part = ops.mask(logits.part, self.words, self.index, first_token_id=logits.first_token_id)
        return replace(logits, part=part)


def choose(
    logits: Logits,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    *,
    draw: Draw,
    ops: OpTable,
) -> torch.Tensor:
    """One token per sample, [S] int64, equal on all ranks, which call this together. Arguments as for `SampleTokens`.

    Ranks compare the winners of their parts of the vocabulary, if they can: 8 bytes per sample, not all logits.
    """
    if logits.group.size > 1 and draw is not Draw.TRUNCATED:
        key_S = ops.race(logits.own, row_S, position_S, params, draw=draw, first_token_id=logits.first_token_id)
        return winners(all_reduce_max(key_S, logits.group))
    return ops.sample(logits.gather(), row_S, position_S, params, draw=draw)


def sample(
    logits: Logits, samples: Samples, *, table: RowTable, ops: OpTable, masks: TokenMasks | None = None
) -> SampledBatch:
    """One token per sample, equal on all ranks, which call this together. Logits stay as they are."""
    params = table.sampling.tensors
    if not any(needs_all_logits(sampling) for sampling in samples.samplings):
        allowed = logits if masks is None else masks.apply(logits, ops)
        return SampledBatch(
            choose(allowed, samples.row, samples.position, params, draw=samples.draw, ops=ops), logprobs=None
        )
    logits_SV = chosen_from_SV = logits.gather()
    if any(adjusts(sampling) for sampling in samples.samplings):
        chosen_from_SV = ops.adjust(logits_SV, samples.row, samples.position, params, table.tokens)
    if masks is not None:
        chosen_from_SV = ops.mask(chosen_from_SV, masks.words, masks.index, first_token_id=0)
    token_ids = ops.sample(chosen_from_SV, samples.row, samples.position, params, draw=samples.draw)
    logprobs, count = None, len(samples.samplings)
    if logits.group.rank == 0 and any(sampling.logprobs is not None for sampling in samples.samplings):
        logprobs = gather_logprobs(logits_SV[:count], token_ids[:count], samples.samplings)
    return SampledBatch(token_ids, logprobs)


def gather_logprobs(
    logits_SV: torch.Tensor, token_ids: torch.Tensor, samplings: tuple[SamplingParams, ...]
) -> LogprobTensors:
    """Log probability of each row's token and of its most likely alternatives, from raw logits, without a full sort."""
    logits_SV = logits_SV.to(torch.float32)
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
