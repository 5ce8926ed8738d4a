"""What a client reads when an engine dies in the middle of its answer is what it would have read anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from atom_cluster.api.answers.outputs import Output, RunningOutputs
from atom_cluster.api.answers.pieces import PLAIN, OutputParser, ReasoningPiece, ToolCallArguments, ToolCallBegun
from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.parsers.dialect import REASONING_FORMATS, TOOL_FORMATS
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.link.codec import Message
from atom_cluster.messages.requests import EngineRequest, SamplingParams, TokenBatch, TokenDelta, TokenLogprobs
from tests.api.parsers.reading import make_parser
from tests.api.tiny_tokenizers import EOS_ID, byte_level
from tests.serving.conftest import eventually
from tests.serving.scripted import Cluster, Peer

TEXT = "one € two STOP three"
STOP = "STOP"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


def speak(token_ids: list[int], num_tokens: int) -> Callable[[Peer, str, Message], None]:
    """An engine that goes on with an answer up to so many tokens, one delta each, and ends it with its last."""

    def answer(peer: Peer, source: str, message: Message) -> None:
        if not isinstance(message, EngineRequest):
            return
        assert list(message.emitted) == token_ids[: len(message.emitted)]
        for index in range(len(message.emitted), num_tokens):
            delta = TokenDelta(
                request_id=message.request_id,
                first_index=index,
                token_ids=(token_ids[index],),
                logprobs=(TokenLogprobs(-float(index)),),
                finish_reason="stop" if index == len(token_ids) - 1 else None,
            )
            peer.endpoint.send(source, TokenBatch((delta,)))

    return answer


async def ask(
    tokenizer: Tokenizer, *, num_tokens: int, text: str = TEXT, stop: tuple[str, ...] = (), parser: OutputParser = PLAIN
) -> Output:
    """An answer whose engine dies after so many tokens, as the API sees it."""
    token_ids = [*tokenizer.encode(text), EOS_ID]
    cluster = Cluster()
    await cluster.start()
    first = await cluster.add("first", speak(token_ids, num_tokens))
    second = await cluster.add("second", speak(token_ids, len(token_ids)))
    cluster.order = [first.endpoint.address, second.endpoint.address]
    request = GenerateInput(
        request_id="r", token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=99, seed=0, logprobs=0)
    )
    output = Output(0, request, tokenizer, stop=stop, eos=frozenset({EOS_ID}), parser=parser)
    async with RunningOutputs(cluster.client, [output]) as running:
        await eventually(lambda: bool(first.received) and output.num_tokens >= num_tokens)
        cluster.client.lose("first")
        await eventually(lambda: running.is_done)
    assert not cluster.client.has_open_requests
    await cluster.close()
    return output


@pytest.mark.parametrize("stop", [(), (STOP,)], ids=["to its end", "to a stop string"])
async def test_an_answer_is_the_same_wherever_its_engine_dies(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    expected_text = TEXT[: TEXT.index(STOP)] if stop else TEXT
    num_shown = len(tokenizer.encode(TEXT[: TEXT.index(STOP)] + STOP)) if stop else len(tokenizer.encode(TEXT)) + 1
    for num_tokens in range(num_shown):  # within a character and within the stop string, too
        output = await ask(tokenizer, num_tokens=num_tokens, stop=stop)
        news = output.take()
        assert news is not None
        assert (news.text, news.finish_reason) == (expected_text, "stop"), num_tokens
        assert output.num_tokens == num_shown
        # One log probability for each token, in order, whichever engine it came from.
        assert [score.logprobs.logprob for score in news.scores] == [-float(index) for index in range(num_shown)]


async def test_a_call_is_the_same_wherever_its_engine_dies(tokenizer: Tokenizer) -> None:
    """What reads the output is where its text is made; engines know nothing of it."""
    text = '<think>hm</think><tool_call>{"name": "f", "arguments": {"a": "€"}}</tool_call>'
    for num_tokens in range(3, len(tokenizer.encode(text)), 10):
        parser = make_parser(TOOL_FORMATS["hermes"], REASONING_FORMATS["think"])
        output = await ask(tokenizer, num_tokens=num_tokens, text=text, parser=parser)
        news = output.take()
        assert news is not None and news.finish_reason == "tool_calls"
        assert news.pieces == [
            ReasoningPiece("hm"),
            ToolCallBegun(0, "id-0", "f"),
            ToolCallArguments(0, '{"a": "€"}'),
        ]
        assert output.num_reasoning_tokens == len("hm</think>")
