"""What a sampling row's result does to its request: tokens appended up to the one that ends the output, KV confirmed.

Knows nothing of who hears of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.scheduler import ScheduledRow
from atom_cluster.engine.stopping import finish_reason
from atom_cluster.errors import RequestFailed
from atom_cluster.messages.requests import FinishReason, TokenLogprobs
from atom_cluster.messages.steps import PromptScores, RowStep, SampledTokens


class NewTokens(NamedTuple):
    """Tokens that a request's `tokens` end with now, for its client."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None


def append_tokens(
    request: Request, token_ids: Sequence[int], logprobs: tuple[TokenLogprobs, ...] | None, *, max_model_len: int
) -> NewTokens:
    """Append tokens, and no more than the output takes: what follows its end is dropped."""
    if request.sampling.max_tokens == 0:
        return NewTokens((), None, "length")  # its prompt was to be scored
    count, reason = 0, None
    for token_id in token_ids:
        request.tokens.append(token_id)
        count += 1
        reason = finish_reason(
            token_id,
            num_output=request.num_output,
            num_known=len(request.tokens),
            max_model_len=max_model_len,
            sampling=request.sampling,
            eos=request.eos,
        )
        if reason is not None:
            break
    return NewTokens(tuple(token_ids[:count]), None if logprobs is None else logprobs[:count], reason)


def end_before_first(request: Request, *, max_model_len: int) -> FinishReason | None:
    """Why a request that has just arrived is over already: what it was sent with ends with its last token."""
    if not request.num_output:
        return None
    return finish_reason(
        request.tokens[-1],
        num_output=request.num_output,
        num_known=len(request.tokens),
        max_model_len=max_model_len,
        sampling=request.sampling,
        eos=request.eos,
    )


def failure_of(sampled: SampledTokens | None) -> RequestFailed | None:
    """Why a row cannot go on, if it cannot."""
    return None if sampled is None or sampled.error is None else cannot_structure(sampled.error)


def cannot_structure(reason: str) -> RequestFailed:
    """A request has no output, or no more of it, since it has a grammar."""
    return RequestFailed(f"the output cannot be given the structure that was asked for: {reason}")


def note_scores(rows: Sequence[ScheduledRow], steps: Sequence[RowStep], found: Sequence[PromptScores]) -> None:
    """Give scores to the requests of a step's rows. They hold whatever became of the row: tokens do not change."""
    by_row = {scores.row: scores for scores in found}
    for row, step in zip(rows, steps, strict=True):
        scores = by_row.get(step.row)
        if scores is not None and row.request.wants_prompt_scores:
            row.request.note_prompt_scores(scores.start, scores.scores)


def confirm_row(row: ScheduledRow, sampled: SampledTokens | None) -> None:
    """The row's tokens are computed, and as many of its drafts as were kept. Says nothing of an earlier residence."""
    request = row.request
    if row.residence != request.residence or request.phase is not Phase.RUNNING:
        return
    num_kept = 0 if sampled is None else len(sampled.token_ids) - 1
    request.num_confirmed += row.num_tokens - row.num_drafts + num_kept + row.num_skipped
    request.num_computed += num_kept
    request.num_unverified -= row.num_drafts
    if sampled is not None:
        request.drafts = sampled.drafts
