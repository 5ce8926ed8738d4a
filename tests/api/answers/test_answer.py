"""Token counts and times of an answer, and the end of one that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping

from atom_cluster.api.answers.answer import Answer, AnswerPlan, usage_of
from atom_cluster.api.answers.outputs import Output
from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.openai.format import AnswerHeader, CompletionFormat
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.messages.requests import SamplingParams, TokenDelta
from atom_cluster.observability.metrics import NullMetrics
from tests.api.fake_generator import FakeGenerator


def test_prompts_count_once_and_cached_tokens_are_those_found_before_the_request(tokenizer: Tokenizer) -> None:
    outputs = []
    for index, (num_prompt, num_output, cached) in enumerate([(10, 3, 4), (10, 2, 9), (20, 1, 16), (20, 1, 16)]):
        request = GenerateInput(request_id="r", token_ids=(1,) * num_prompt, sampling=SamplingParams())
        output = Output(index, request, tokenizer, stop=(), eos=frozenset())
        output.push(
            TokenDelta(
                request_id="r",
                first_index=0,
                token_ids=(1,) * num_output,
                finish_reason="length",
                num_cached_tokens=cached,
            )
        )
        output.first_token_at_s, output.last_token_at_s = 101.0 + index, 101.0 + index + 0.5 * (num_output - 1)
        outputs.append(output)
    header = AnswerHeader(id="i", created=0, model="m", usage_in_stream=False, has_logprobs=False)
    plan = AnswerPlan(
        outputs=outputs,
        num_outputs_per_prompt=2,
        words=CompletionFormat(header, tokenizer),
        is_streamed=False,
        arrived_at_s=100.0,
    )
    usage = usage_of(plan)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (30, 7, 37)
    assert usage.prompt_tokens_details.cached_tokens == 4 + 16
    assert (usage.ttft_s, usage.tpot_s, usage.latency_s) == (1.0, 0.5, 4.0)


async def test_a_client_that_takes_nothing_is_cut_off_and_its_generation_ended(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    generator = FakeGenerator(lambda request: [tuple(tokenizer.encode("a")), never])
    request = GenerateInput(request_id="r", token_ids=(1,), sampling=SamplingParams())
    header = AnswerHeader(id="i", created=0, model="m", usage_in_stream=False, has_logprobs=False)
    plan = AnswerPlan(
        outputs=[Output(0, request, tokenizer, stop=(), eos=frozenset())],
        num_outputs_per_prompt=1,
        words=CompletionFormat(header, tokenizer),
        is_streamed=True,
        arrived_at_s=0.0,
    )
    answer = Answer(plan, generator=generator, metrics=NullMetrics(), coalesce_s=0.0, write_timeout_s=0.01)

    async def receive() -> dict[str, object]:
        await never.wait()
        return {}

    async def send(message: MutableMapping[str, object]) -> None:
        if message["type"] == "http.response.body":
            await never.wait()

    await asyncio.wait_for(answer({"type": "http"}, receive, send), 10)
    assert generator.requests and not generator.open_ids
