"""The helpers of OpenAI's and Anthropic's clients over the quick start's cluster: tools, streams, models, errors.

What a helper makes of a stream has to be what it makes of the whole answer, so all of them are greedy. The demo model
never saw a tool: its grammar makes it call one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
TURNS = [{"role": "user", "content": "How is the weather in Paris?"}]


class Weather(BaseModel):
    """Weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)
    unit: Literal["C", "F"]


class Clock(BaseModel):
    """Time in a zone."""

    model_config = ConfigDict(extra="forbid")

    zone: Literal["CET", "UTC"]


TOOLS = [openai.pydantic_function_tool(Weather, name="weather"), openai.pydantic_function_tool(Clock, name="clock")]
ARGUMENTS: dict[str, type[BaseModel]] = {"weather": Weather, "clock": Clock}
NAMED = {"type": "function", "function": {"name": "weather"}}
CHAT = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": 120}
RESPONSE = {"model": MODEL, "input": TURNS, "temperature": 0, "max_output_tokens": 120}
MESSAGE = {"model": MODEL, "messages": TURNS, "max_tokens": 120, "extra_body": {"temperature": 0}}
MESSAGE_TOOLS = [
    {"name": name, "description": model.__doc__, "input_schema": model.model_json_schema()}
    for name, model in ARGUMENTS.items()
]


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def other(cluster: RunningCluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=cluster.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_chat_calls_a_tool_streamed_as_whole(client: openai.OpenAI, choice: object) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    whole = client.chat.completions.parse(**body).choices[0]
    with client.chat.completions.stream(**body) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    (call,), (same,) = whole.message.tool_calls, streamed.message.tool_calls
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == (same.function.name, same.function.arguments)
    assert isinstance(call.function.parsed_arguments, ARGUMENTS[call.function.name])
    assert call.function.parsed_arguments == same.function.parsed_arguments
    assert call.function.name == "weather" or choice == "required"
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == call.function.arguments and len(deltas) > 2
    for turn in (whole.message, streamed.message):
        result = {"role": "tool", "tool_call_id": turn.tool_calls[0].id, "content": "rain"}
        more = {"messages": [*TURNS, turn, result], "tool_choice": "none", "max_tokens": 4}
        assert client.chat.completions.create(**{**body, **more}).choices[0].message.content


def test_chat_streams_structured_output(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(**CHAT, response_format=Weather).choices[0].message
    with client.chat.completions.stream(**CHAT, response_format=Weather) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0].message
    assert isinstance(whole.parsed, Weather) and streamed.parsed == whole.parsed
    (done,) = [event for event in events if event.type == "content.done"]
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == done.content == whole.content and done.parsed == whole.parsed


def test_responses_call_a_tool_and_stream_structured_output(client: openai.OpenAI) -> None:
    body = {**RESPONSE, "tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}}
    whole = client.responses.parse(**body)
    with client.responses.stream(**body) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    (call,), (same,) = whole.output, streamed.output
    assert (call.type, call.name, call.arguments) == (same.type, same.name, same.arguments)
    assert isinstance(call.parsed_arguments, Weather) and same.parsed_arguments == call.parsed_arguments
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments and len(deltas) > 2
    turns = [*TURNS, call, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    answer = client.responses.parse(**{**body, "input": turns, "tool_choice": "none", "max_output_tokens": 4})
    assert answer.output_text
    with client.responses.stream(**RESPONSE, text_format=Weather) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert isinstance(response.output_parsed, Weather) and response.output_text == text


def test_messages_call_a_tool_streamed_as_whole(other: anthropic.Anthropic) -> None:
    body = {**MESSAGE, "tools": MESSAGE_TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    whole = other.messages.create(**body)
    with other.messages.stream(**body) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    (call,), (same,) = whole.content, streamed.content
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert (call.name, call.input) == (same.name, same.input) and len(pieces) > 2
    jsonschema.validate(call.input, ARGUMENTS[call.name].model_json_schema())


def test_messages_stream_structured_output(other: anthropic.Anthropic) -> None:
    with other.messages.stream(**MESSAGE, output_format=Weather) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert message.parsed_output == Weather.model_validate_json(text)
    counted = other.messages.count_tokens(model=MODEL, messages=TURNS)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models_are_listed_and_errors_are_the_clients_own(client: openai.OpenAI, other: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    for wrong, param in (
        (lambda: client.chat.completions.create(**{**CHAT, "messages": []}), "messages"),
        (lambda: client.completions.create(model=MODEL, prompt="a", temperature=-1), "temperature"),
        (lambda: client.responses.create(**{**RESPONSE, "previous_response_id": "r"}), "previous_response_id"),
        (lambda: client.chat.completions.create(**CHAT, tools=TOOLS[1:], tool_choice=NAMED), "tool_choice"),
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            wrong()
        assert (bad.value.param, bad.value.type) == (param, "invalid_request_error")
        assert bad.value.request_id
    for missing in (
        lambda: client.models.retrieve("none"),
        lambda: client.chat.completions.create(**{**CHAT, "model": "none"}, stream=True),
        lambda: client.responses.create(**{**RESPONSE, "model": "none"}),
    ):
        with pytest.raises(openai.NotFoundError) as absent:
            missing()
        assert (absent.value.param, absent.value.code) == ("model", "model_not_found")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        other.messages.create(**{**MESSAGE, "max_tokens": 0})
    with pytest.raises(anthropic.NotFoundError):
        other.messages.create(**{**MESSAGE, "model": "none"})


async def test_asynchronous_clients_stream_side_by_side(cluster: RunningCluster) -> None:
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    short = {**CHAT, "messages": turns}

    async def chat(client: openai.AsyncOpenAI) -> str:
        async with client.chat.completions.stream(**short) as stream:
            return (await stream.get_final_completion()).choices[0].message.content

    async def responses(client: openai.AsyncOpenAI) -> str:
        async with client.responses.stream(**{**RESPONSE, "input": turns}) as stream:
            events = [event async for event in stream]
        assert events[-1].type == "response.completed"
        return events[-1].response.output_text

    async def messages(client: anthropic.AsyncAnthropic) -> str:
        async with client.messages.stream(**{**MESSAGE, "messages": turns}) as stream:
            return "".join([text async for text in stream.text_stream])

    async def completions(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async with (
        openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client,
        anthropic.AsyncAnthropic(base_url=cluster.url, api_key="none", max_retries=0) as other,
    ):
        told = await asyncio.gather(chat(client), responses(client), messages(other), completions(client))
        whole = await client.chat.completions.create(**short)
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(**{**short, "max_tokens": 0})
        assert [model.id async for model in client.models.list()] == [MODEL]
    assert told[0] == told[1] == told[2] == whole.choices[0].message.content and told[3]
    assert bad.value.param == "max_tokens"
