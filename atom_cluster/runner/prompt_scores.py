"""How likely a model finds the prompt itself: log probabilities of prompt tokens, chunk by chunk (`prompt_logprobs`).

A chunk's hidden states are there already; what a scored chunk adds is the output head at each of its positions. That is
done a few positions at a time, since logits over a vocabulary are large: `SLICE` bounds the memory. Ranks of a gang
look at their own parts of the vocabulary and exchange a few numbers per position, not logits. Suffixes: N positions
that are scored in a step, S those of a slice, V' this rank's part of the vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from atom_cluster.layers.logits import Logits
from atom_cluster.messages.requests import PromptScore, TopLogprob
from atom_cluster.messages.steps import PromptScores, RowStep
from atom_cluster.models.protocol import CausalLM
from atom_cluster.parallel.collectives import all_reduce_max, all_reduce_sum, gather_last_dim
from atom_cluster.runner.row_state import RowTable

SLICE = 128
"""Positions whose logits exist at once. [SLICE, V'] float32, and a mask of that shape."""


class ScoredSlice(NamedTuple):
    """Scores of S positions, the same on every rank."""

    logprob_S: torch.Tensor
    """float32"""
    rank_S: torch.Tensor
    """float32, and whole: 1 plus the number of tokens that are more likely."""
    top_ids_SK: torch.Tensor
    """int64, most likely first."""
    top_SK: torch.Tensor
    """float32"""


class _Span(NamedTuple):
    """The scored positions of one row of a step."""

    step: RowStep
    first_index: int
    """Index into the step's tokens of the first one."""
    num_scored: int
    num_top: int


@dataclass(frozen=True, slots=True)
class PendingScores:
    """Scores of one step, on their way to the host. Tensors as in `ScoredSlice`, of N positions, in host memory."""

    spans: tuple[_Span, ...]
    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def read(self) -> tuple[PromptScores, ...]:
        """As the engine gets it. The device must have finished the step."""
        logprob, rank = self.logprob.tolist(), self.rank.tolist()
        top_ids, top = self.top_ids.tolist(), self.top.tolist()
        found, first = [], 0
        for span in self.spans:
            scores = tuple(
                PromptScore(
                    logprob[i],
                    int(rank[i]),
                    tuple(TopLogprob(token_id, value) for token_id, value in zip(top_ids[i][: span.num_top], top[i])),
                )
                for i in range(first, first + span.num_scored)
            )
            found.append(PromptScores(span.step.row, span.step.start, scores))
            first += span.num_scored
        return tuple(found)


class PromptScorer:
    """Scores the prompts of one rank's steps. Borrows everything."""

    def __init__(self, model: CausalLM, table: RowTable, *, is_first_rank: bool) -> None:
        self._model = model
        self._table = table
        self._is_first_rank = is_first_rank

    def score(
        self, steps: Sequence[RowStep], query_start: Sequence[int], hidden_TD: torch.Tensor
    ) -> PendingScores | None:
        """What these rows of a step ask for, on the first rank; all ranks call it. None if no row asks for anything.

        query_start: [R + 1] index into T of each row's first token.
        """
        spans = self._spans(steps, query_start)
        if not spans:
            return None
        index_N, targets_N = self._places(spans, hidden_TD.device)
        num_top = max(span.num_top for span in spans)
        slices = [
            score_slice(self._model.compute_logits(hidden_TD[index_S]), targets_S, num_top)
            for index_S, targets_S in zip(torch.split(index_N, SLICE), torch.split(targets_N, SLICE))
        ]
        if not self._is_first_rank:
            return None
        logprob, rank, top_ids, top = (torch.cat(parts).to("cpu", non_blocking=True) for parts in zip(*slices))
        return PendingScores(spans, logprob, rank, top_ids, top)

    def _spans(self, steps: Sequence[RowStep], query_start: Sequence[int]) -> tuple[_Span, ...]:
        """Rows with scored positions: those whose next token is of the prompt as well. Rows that decode have none."""
        spans = []
        for step, first_index in zip(steps, query_start):
            row = self._table.get(step.row)
            num_top = row.sampling.prompt_logprobs
            if num_top is None or (step.samples and step.num_tokens == step.num_drafts + 1):
                continue
            count = min(step.start + step.num_tokens, row.num_prompt_tokens - 1) - step.start
            if count > 0:
                spans.append(_Span(step, first_index, count, num_top))
        return tuple(spans)

    def _places(self, spans: Sequence[_Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] int64: where the positions are among the step's tokens; and the tokens that follow them."""
        index = [torch.arange(span.first_index, span.first_index + span.num_scored, device=device) for span in spans]
        tokens = self._table.tokens
        targets = [tokens[step.row, step.start + 1 : step.start + 1 + count] for step, _, count, _ in spans]
        return torch.cat(index), torch.cat(targets).to(torch.int64)


def score_slice(logits: Logits, targets_S: torch.Tensor, num_top: int) -> ScoredSlice:
    """Scores of the tokens `targets_S` [S] int64. All ranks call it together. Overwrites the logits."""
    part_SV, group = logits.part, logits.group
    part_SV[:, logits.own.shape[1] :] = -torch.inf  # columns that stand for no token
    local_S = targets_S - logits.first_token_id
    is_own_S = (local_S >= 0) & (local_S < part_SV.shape[1])
    own_S = part_SV.gather(1, local_S.clamp(0, part_SV.shape[1] - 1).unsqueeze(1)).squeeze(1)
    target_and_most = torch.stack((torch.where(is_own_S, own_S, -torch.inf), part_SV.amax(dim=1)))
    target_S, most_S = all_reduce_max(target_and_most, group)
    num_above_S = (part_SV > target_S.unsqueeze(1)).sum(dim=1).to(torch.float32)
    top_SK, top_ids_SK = _top(logits, num_top)
    mass_S = part_SV.sub_(most_S.unsqueeze(1)).exp_().sum(dim=1)  # the last use of the logits
    num_above_S, mass_S = all_reduce_sum(torch.stack((num_above_S, mass_S)), group)
    log_mass_S = most_S + mass_S.log()
    return ScoredSlice(target_S - log_mass_S, num_above_S + 1, top_ids_SK, top_SK - log_mass_S.unsqueeze(1))


def _top(logits: Logits, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of the whole vocabulary: logits and ids, [S, K]. Ranks exchange their own best ones."""
    part_SV, group = logits.part, logits.group
    own = part_SV.topk(min(num_top, part_SV.shape[1]), dim=1)
    values = gather_last_dim(own.values, group)
    ids = gather_last_dim(own.indices + logits.first_token_id, group)
    best = values.topk(min(num_top, logits.vocab_size, values.shape[1]), dim=1)
    return best.values, ids.gather(1, best.indices)
