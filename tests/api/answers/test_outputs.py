"""Outputs collect tokens, end where they should, and never leave a generator open."""

from __future__ import annotations

import asyncio

import pytest

from atom_cluster.api.answers.outputs import Output, RunningOutputs
from atom_cluster.api.answers.pieces import ReasoningPiece, TextPiece
from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.parsers.dialect import REASONING_FORMATS, TOOL_FORMATS
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded, RequestFailed
from atom_cluster.messages.requests import FinishReason, SamplingParams, TokenDelta, TokenLogprobs
from tests.api.fake_generator import FakeGenerator, Script
from tests.api.parsers.reading import make_parser
from tests.api.tiny_tokenizers import EOS_ID


def make_output(tokenizer: Tokenizer, index: int = 0, *, stop: tuple[str, ...] = (), **sampling: object) -> Output:
    request = GenerateInput(request_id=f"r-{index}", token_ids=(1,), sampling=SamplingParams(**sampling))  # type: ignore[arg-type]
    return Output(index, request, tokenizer, stop=stop, eos=frozenset({EOS_ID}))


def delta(
    ids: list[int] | tuple[int, ...], finish: FinishReason | None = None, *, cached: int = 0, scored: bool = False
) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        first_index=0,
        token_ids=tuple(ids),
        finish_reason=finish,
        num_cached_tokens=cached,
        logprobs=tuple(TokenLogprobs(-1.0) for _ in ids) if scored else None,
    )


def test_the_token_that_ends_an_output_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    letter = tokenizer.encode("a")[0]
    for ids, sampling in (((letter, EOS_ID), {}), ((letter, letter), {"stop_token_ids": (letter,)})):
        output = make_output(tokenizer, **sampling)
        output.push(delta(ids, "stop"))
        news = output.take()
        assert news is not None and (news.text, news.finish_reason) == ("a", "stop")
        assert output.num_tokens == 2


def test_the_last_token_is_shown_when_the_length_ended_the_output(tokenizer: Tokenizer) -> None:
    output = make_output(tokenizer)
    output.push(delta(tokenizer.encode("ab"), "length"))
    news = output.take()
    assert news is not None and (news.text, news.finish_reason) == ("ab", "length")


def test_log_probabilities_end_with_the_token_that_completed_a_stop_string(tokenizer: Tokenizer) -> None:
    output = make_output(tokenizer, stop=("c",))
    output.push(delta(tokenizer.encode("abcdef"), scored=True))
    news = output.take()
    assert news is not None and news.text == "ab"
    assert [score.text_offset for score in news.scores] == [0, 1, 2]
    assert output.num_tokens == 3


def test_log_probabilities_wait_for_their_text(tokenizer: Tokenizer) -> None:
    output = make_output(tokenizer)
    ids = tokenizer.encode("€")
    output.push(delta(ids[:2], scored=True))
    assert output.take() is None
    output.push(delta(ids[2:], scored=True))
    news = output.take()
    assert news is not None and news.text == "€" and len(news.scores) == 3


def test_news_are_told_once(tokenizer: Tokenizer) -> None:
    output = make_output(tokenizer)
    output.push(delta(tokenizer.encode("ab"), scored=True))
    first = output.take()
    output.push(delta(tokenizer.encode("c"), "length", scored=True))
    second = output.take()
    assert first is not None and second is not None and output.take() is None
    assert (first.text, second.text) == ("ab", "c")
    assert (len(first.scores), len(second.scores)) == (2, 1)
    assert (first.finish_reason, second.finish_reason) == (None, "length")


def test_an_abort_that_nobody_asked_for_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestFailed):
        make_output(tokenizer).push(delta((), "abort"))


async def run(tokenizer: Tokenizer, script: Script, num_outputs: int = 1, **options: object) -> FakeGenerator:
    generator = FakeGenerator(script)
    outputs = [make_output(tokenizer, index, **options) for index in range(num_outputs)]  # type: ignore[arg-type]
    async with RunningOutputs(generator, outputs) as running:
        await running.wait_until_done()
    assert not generator.open_ids
    return generator


async def test_everything_that_arrived_is_handed_over_at_once(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    letters = tokenizer.encode("abcd")
    generator = FakeGenerator(lambda request: [*[(letter,) for letter in letters], gate, "stop"])
    async with RunningOutputs(generator, [make_output(tokenizer, index) for index in range(2)]) as running:
        for _ in range(20):
            await asyncio.sleep(0)
        news = await running.wait_for_news()
        assert {(entry.index, entry.text) for entry in news} == {(0, "abcd"), (1, "abcd")}
        gate.set()
        assert {entry.finish_reason for entry in await running.wait_until_done()} == {"stop"}


async def test_outputs_that_grew_are_told_once_whether_they_are_news_yet_or_not(tokenizer: Tokenizer) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    letter, euro = tokenizer.encode("a"), tokenizer.encode("€")

    def script(request: GenerateInput) -> list[object]:
        gate = gates[int(request.request_id.removeprefix("r-"))]
        return [tuple(letter), gate, tuple(euro[:1]), gate, "stop"]

    async with RunningOutputs(FakeGenerator(script), [make_output(tokenizer, index) for index in range(3)]) as running:  # type: ignore[arg-type]

        async def grown() -> list[int]:
            for _ in range(20):
                await asyncio.sleep(0)
            return sorted(output.index for output in running.take_grown())

        assert await grown() == [0, 1, 2]
        assert await grown() == []
        gates[1].set()
        assert await grown() == [1], "part of a character: no text yet, and a token all the same"
        for gate in gates:
            gate.set()
        await running.wait_until_done()
        assert await grown() == [0, 2]


async def test_a_stop_string_closes_the_generator(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    await run(tokenizer, lambda request: [tuple(tokenizer.encode("a stop")), never], stop=("stop",))


async def test_one_output_s_error_cancels_the_others(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()

    def script(request: GenerateInput) -> list[object]:
        return [Overloaded("full")] if request.request_id == "r-1" else [never]

    with pytest.raises(Overloaded):
        await run(tokenizer, script, num_outputs=3)  # type: ignore[arg-type]


async def test_a_generator_that_just_ends_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestFailed):
        await run(tokenizer, lambda request: [(1,)])


async def test_leaving_early_closes_every_generator(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    generator = FakeGenerator(lambda request: [never])
    async with RunningOutputs(generator, [make_output(tokenizer, index) for index in range(4)]):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(generator.open_ids) == 4
    assert not generator.open_ids


def thinking_output(tokenizer: Tokenizer, *, stop: tuple[str, ...] = ()) -> Output:
    """An output that begins within reasoning."""
    request = GenerateInput(request_id="r", token_ids=(1,), sampling=SamplingParams())
    parser = make_parser(reasoning=REASONING_FORMATS["think"], opens=True)
    return Output(0, request, tokenizer, stop=stop, eos=frozenset({EOS_ID}), parser=parser)


@pytest.mark.parametrize("stop", [(), ("</think>€ no",), ("hm€</think>€ o!",)])
@pytest.mark.parametrize("num_at_once", [1, 3, 100])
def test_reasoning_tokens_are_counted_by_where_they_begin(
    tokenizer: Tokenizer, stop: tuple[str, ...], num_at_once: int
) -> None:
    """Also while a possible stop string holds their text back, and when they arrive several at a time."""
    output = thinking_output(tokenizer, stop=stop)
    thought, rest = tokenizer.encode("hm€</think>"), tokenizer.encode("€ ok")
    ids = [*thought, *rest]
    for start in range(0, len(ids), num_at_once):
        output.push(delta(ids[start : start + num_at_once]))
    output.push(delta((EOS_ID,), "stop"))
    news = output.take()
    assert news is not None and news.pieces == [ReasoningPiece("hm€"), TextPiece("€ ok")]
    assert (output.num_reasoning_tokens, output.num_tokens) == (len(thought), len(ids) + 1)


def test_an_output_that_ends_within_reasoning_was_all_reasoning(tokenizer: Tokenizer) -> None:
    output = thinking_output(tokenizer)
    output.push(delta([*tokenizer.encode("hm €")[:-1], EOS_ID], "stop"))
    assert output.num_reasoning_tokens == output.num_tokens == 6
    news = output.take()
    assert news is not None and news.pieces == [ReasoningPiece("hm \ufffd")]


def test_log_probabilities_end_where_enough_was_said(tokenizer: Tokenizer) -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    request = GenerateInput(request_id="r", token_ids=(1,), sampling=SamplingParams())
    parser = make_parser(TOOL_FORMATS["hermes"], one_call=True)
    output = Output(0, request, tokenizer, stop=(), eos=frozenset({EOS_ID}), parser=parser)
    output.push(delta(tokenizer.encode(text), scored=True))
    news = output.take()
    assert news is not None and news.finish_reason == "tool_calls"
    assert len(news.scores) == output.num_tokens == len(tokenizer.encode(text.removesuffix("</tool_call>")))
