"""Steps of all kinds and sizes, run before the first request: what a request meets then has been compiled and loaded.

Kernels have a few variants for numbers of rows and tokens (`ops.triton.runtime.room_for`, tiles of products), libraries
load theirs when they are first called, and either takes a tenth of a second to several. In a step that serves, all
rows would wait for it. Steps that only decode are captured by size; these are the others: prompts, whole, in chunks and
beside rows that decode or verify drafts, and what only some requests ask the sampler for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.units import ceil_div

_CHUNK = 16
"""Tokens of a chunk beside rows that decode: more than drafts and less than what libraries have other ways for."""
_SHORT_CHUNKS = (2, 4, 8, 16, 17)
"""Tokens of chunks that attention takes for rows that verify drafts (`ops.triton.attention.MAX_SPLIT_QUERIES`): its
kernels are cut for powers of two of them, or of them times the heads of a key/value head."""
_CACHED = 256
_MANY_CACHED = 1024
"""Tokens before a chunk for which attention has kernels of its own."""
_FEW = 8
"""Rows up to which kernels are made for their very number."""
_SAMPLINGS = (
    SamplingParams(seed=0, temperature=1.0),
    SamplingParams(seed=0, temperature=1.0, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(seed=0, temperature=0.0, logprobs=5),
    SamplingParams(seed=0, temperature=0.0, prompt_logprobs=1),
    SamplingParams(seed=0, temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.1, min_tokens=2),
    SamplingParams(seed=0, temperature=0.0, logit_bias=((0, 1.0),)),
)
"""Each asks the sampler for something that the others do not."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A row of a step: so many tokens behind others that are taken for computed."""

    num_cached: int
    num_tokens: int
    num_drafts: int = 0


_Step = tuple[list[_Part], SamplingParams]


def warm_up_plans(
    layout: KvLayout, info: RankInfo, *, max_num_batched_tokens: int, decodes: bool, every: int = 1
) -> Iterator[StepPlan]:
    """In order, for a runner without rows, which has none behind the last one either.

    Rows share pages: what they hold does not matter, only that it can be read. decodes: also steps that only decode,
    which are not captured. every: only one of so many steps.
    """
    return _plans(islice(_steps(info, max_num_batched_tokens, decodes=decodes), 0, None, every), layout, info)


def _plans(all_steps: Iterable[_Step], layout: KvLayout, info: RankInfo) -> Iterator[StepPlan]:
    taken: tuple[int, ...] = ()
    for step_id, (parts, sampling) in enumerate(all_steps):
        rows = [_new_row(row, part, sampling, layout, info) for row, part in enumerate(parts)]
        states = _state_pages(layout, info)
        steps = [
            RowStep(row, part.num_cached, part.num_tokens, samples=True, new_pages=states, num_drafts=part.num_drafts)
            for row, part in enumerate(parts)
        ]
        yield StepPlan(step_id=step_id, freed_rows=taken, new_rows=tuple(rows), rows=tuple(steps))
        taken = tuple(range(len(parts)))
    yield StepPlan(step_id=-1, freed_rows=taken)


def _steps(info: RankInfo, max_num_batched_tokens: int, *, decodes: bool) -> Iterator[_Step]:
    greedy = SamplingParams(seed=0, temperature=0.0)
    longest = min(info.max_model_len - 1 - info.max_drafts, max_num_batched_tokens)
    # A prompt alone.
    for num_tokens in _doubled(2, longest):
        yield [_Part(0, num_tokens)], greedy
        # Tiles for experts change at two thirds of powers of two, so there are two kinds of sizes between two powers.
        if _CHUNK <= num_tokens <= longest * 4 // 5:
            yield [_Part(0, num_tokens * 5 // 4)], greedy
    # A chunk behind others.
    for num_tokens in _doubled(_CHUNK, min(longest, info.max_model_len - _CACHED - 1 - info.max_drafts))[::-2]:
        yield [_Part(_CACHED, num_tokens)], greedy
    behind_many = info.max_model_len - 2 * _CHUNK - 1 - info.max_drafts
    if longest >= 2 * _CHUNK and behind_many > _CACHED:
        yield [_Part(min(_MANY_CACHED, behind_many), 2 * _CHUNK)], greedy
    # Several prompts.
    for num_rows in _doubled(2, info.max_num_requests):
        per_row = min(longest, 4 * _CHUNK, max_num_batched_tokens // num_rows)
        if per_row >= 2:
            yield [_Part(0, per_row)] * num_rows, greedy
    # A chunk beside rows that decode, and beside rows that verify drafts.
    beside = max(1, min(_CHUNK, longest, max_num_batched_tokens // 2))
    for num_drafts in {0, info.max_drafts}:
        decoding = _Part(_cached(info, 1 + num_drafts), 1 + num_drafts, num_drafts)
        most_rows = min(info.max_num_requests, 1 + (max_num_batched_tokens - beside) // (1 + num_drafts))
        for num_rows in _row_counts(2, most_rows):
            yield [*[decoding] * (num_rows - 1), _Part(0, beside)], greedy
        for num_rows in _one_of_a_kind(most_rows):
            left = min(longest, max_num_batched_tokens - (num_rows - 1) * (1 + num_drafts))
            for num_tokens in (count for count in _SHORT_CHUNKS if count <= left):
                yield [*[decoding] * (num_rows - 1), _Part(_cached(info, num_tokens), num_tokens)], greedy
        if decodes:
            most_rows = min(info.max_num_requests, max_num_batched_tokens // (1 + num_drafts))
            for num_rows in _row_counts(1, most_rows):
                yield [decoding] * num_rows, greedy
    # Contexts so short that sparse attention has nothing to choose from.
    yield [_Part(1, 1), _Part(0, beside)][: info.max_num_requests], greedy
    if decodes:
        yield [_Part(1, 1)], greedy
    for sampling in _SAMPLINGS:
        yield [_Part(_cached(info, 1), 1), _Part(0, beside)][: info.max_num_requests], sampling


def _doubled(first: int, last: int) -> Sequence[int]:
    """`first`, twice that and so on, and `last`; nothing if that is less."""
    sizes = list(takewhile(lambda size: size < last, (first << i for i in range(32))))
    return [*sizes, last] if last >= first else []


def _row_counts(first: int, last: int) -> Sequence[int]:
    """All few ones, then powers of two, and `last`."""
    few = list(range(first, min(_FEW, last) + 1))
    return few + [count for count in _doubled(first, last) if count > _FEW]


def _one_of_a_kind(last: int) -> Sequence[int]:
    """Numbers of rows up to `last` that kernels tell apart (`ops.triton.runtime.SIZES`)."""
    return [*(count for count in (1, 2, 8, 32, 128, 512, *_doubled(2048, last)) if count < last), last]


def _cached(info: RankInfo, num_tokens: int) -> int:
    """Tokens of a row before so many others."""
    return max(1, min(_CACHED, info.max_model_len - num_tokens - 1 - info.max_drafts))


def _new_row(row: int, part: _Part, sampling: SamplingParams, layout: KvLayout, info: RankInfo) -> NewRow:
    """With tokens up to the last one that the step computes and drafts behind them."""
    num_known = part.num_cached + part.num_tokens - part.num_drafts
    num_blocks = ceil_div(num_known + part.num_drafts + info.max_drafts + 1, info.block_size)
    num_pages = (info.num_blocks, *(group.num_pages for group in info.other_groups))
    pages = tuple(
        () if group.kind == "state" else tuple(block % count for block in range(num_blocks))
        for group, count in zip(layout.groups, num_pages)
    )
    return NewRow(
        row=row,
        request_id=f"warm-up-{row}",
        token_ids=(0,) * num_known,
        num_prompt_tokens=num_known,
        pages=pages,
        sampling=sampling,
        drafts=(0,) * part.num_drafts,
    )


def _state_pages(layout: KvLayout, info: RankInfo) -> tuple[tuple[int, ...], ...]:
    """Pages that a row's step brings: for its states, if the model has any."""
    if layout.groups[-1].kind != "state":
        return ()
    return ((),) * (len(layout.groups) - 1) + (tuple(range(1 + info.max_drafts)),)
