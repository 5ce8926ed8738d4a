"""A stream merges what is pending, notices gaps, and raises what the engine said."""

from __future__ import annotations

import asyncio

import pytest

from atom_cluster.errors import EngineLost, RequestFailed, RequestTimeout
from atom_cluster.messages.requests import PromptScore, RequestError, TokenDelta, TokenLogprobs
from atom_cluster.serving.streams import DeltaStream
from atom_cluster.units import Deadline


def delta(first_index: int, *token_ids: int, finish: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id="r", first_index=first_index, token_ids=token_ids, finish_reason="stop" if finish else None
    )


def soon() -> Deadline:
    return Deadline.after(5.0)


async def test_pending_deltas_are_read_as_one() -> None:
    stream = DeltaStream("r", "engine")
    stream.push(delta(0, 7))
    assert (await stream.read(soon())).token_ids == (7,)
    stream.push(delta(1, 8, 9))
    stream.push(delta(3, 10, finish=True))
    merged = await stream.read(soon())
    assert (merged.first_index, merged.token_ids, merged.finish_reason) == (1, (8, 9, 10), "stop")


async def test_logprobs_stay_with_their_tokens_when_merged() -> None:
    stream = DeltaStream("r", "engine")
    for index in range(3):
        entry = (TokenLogprobs(-float(index)),)
        stream.push(TokenDelta(request_id="r", first_index=index, token_ids=(index,), logprobs=entry))
    assert (await stream.read(soon())).logprobs == tuple(TokenLogprobs(-float(index)) for index in range(3))


async def test_scores_of_the_prompt_survive_a_merge() -> None:
    scores = (None, PromptScore(-1.0, 1))
    first = TokenDelta(request_id="r", first_index=0, token_ids=(7,), prompt_logprobs=scores)
    stream = DeltaStream("r", "engine")
    stream.push(first)
    stream.push(delta(1, 8))
    merged = await stream.read(soon())
    assert (merged.token_ids, merged.prompt_logprobs) == ((7, 8), scores)


@pytest.mark.parametrize("next_index", [0, 2])
async def test_a_lost_or_doubled_delta_fails_the_request_after_what_was_good(next_index: int) -> None:
    stream = DeltaStream("r", "engine")
    stream.push(delta(0, 7))
    stream.push(delta(next_index, 8))
    assert (await stream.read(soon())).token_ids == (7,)
    with pytest.raises(RequestFailed, match="lost"):
        await stream.read(soon())


async def test_an_error_comes_after_the_tokens_that_precede_it() -> None:
    stream = DeltaStream("r", "engine")
    stream.push(delta(0, 7))
    error = RequestError(kind="RequestTimeout", message="too slow")
    stream.push(TokenDelta(request_id="r", first_index=1, finish_reason="error", error=error))
    first = await stream.read(soon())
    assert (first.token_ids, first.finish_reason) == ((7,), None)
    with pytest.raises(RequestTimeout, match="too slow"):
        await stream.read(soon())


async def test_a_read_ends_with_its_deadline() -> None:
    with pytest.raises(RequestTimeout):
        await DeltaStream("r", "engine").read(Deadline.after(0.01))


async def test_the_first_failure_is_the_one_that_is_told() -> None:
    stream = DeltaStream("r", "engine")
    stream.fail(EngineLost("gone"))
    stream.fail(RequestFailed("later"))
    with pytest.raises(EngineLost):
        await stream.read(soon())


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_cancellation_that_comes_together_with_a_delta_is_not_forgotten(num_turns: int) -> None:
    stream = DeltaStream("r", "engine")

    async def read_forever() -> None:
        while True:
            await stream.read(soon())

    reader = asyncio.create_task(read_forever())
    await asyncio.sleep(0.01)
    stream.push(delta(0, 7))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait((reader,), timeout=20.0)
    assert reader.cancelled()
