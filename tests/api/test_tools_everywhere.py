"""A model that thinks and calls a tool, asked through each endpoint by its official client: call, result, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.api.conftest import MODEL, Api, Serve
from tests.api.tool_model import CALLING, SCHEMA, ToolApi

Make = Callable[[str], ToolApi]
QUESTION = {"role": "user", "content": "weather in Oslo?"}
RESPONSES_TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "description": "d", "strict": False}
MESSAGES_TOOL = {"name": "weather", "input_schema": SCHEMA, "description": "d"}
RESULT_TURNS = (
    "<|im_start|>assistant\n<think>hm</think>look:<call {id} weather {arguments}><|im_end|>\n"
    "<|im_start|>tool\nrain<answers {id}><|im_end|>\n<tool weather>"
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ToolApi] = []

    def make(text: str) -> ToolApi:
        made.append(ToolApi(tmp_path, text))
        return made[-1]

    yield make
    for entry in made:
        entry.service.close()


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def anthropic_client(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("streams", [False, True])
async def test_responses(make: Make, serve: Serve, streams: bool) -> None:
    tools = make(CALLING)
    async with openai_client(await serve(tools.api.app)) as client:
        arguments = {"model": MODEL, "input": [QUESTION], "tools": [RESPONSES_TOOL]}
        if streams:
            async with client.responses.stream(**arguments) as stream:
                kinds = {event.type async for event in stream}
                response = await stream.get_final_response()
            assert kinds >= {"response.reasoning_text.delta", "response.function_call_arguments.delta"}
        else:
            response = await client.responses.create(**arguments)
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        reasoning, message, call = response.output
        assert reasoning.content[0].text == "hm" and message.content[0].text == "look:"
        assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        sent = [item.model_dump(exclude_none=True) for item in response.output]
        for item in sent:
            item.pop("parsed_arguments", None)
            for part in item.get("content", []):
                part.pop("parsed", None)
        await client.responses.create(**{**arguments, "input": [QUESTION, *sent, result]})
    assert RESULT_TURNS.format(id=call.call_id, arguments='{"city": "Oslo"}') in tools.prompt()


@pytest.mark.parametrize("streams", [False, True])
async def test_messages(make: Make, serve: Serve, streams: bool) -> None:
    tools = make(CALLING)
    async with anthropic_client(await serve(tools.api.app)) as client:
        arguments = {"model": MODEL, "max_tokens": 500, "messages": [QUESTION], "tools": [MESSAGES_TOOL]}
        if streams:
            async with client.messages.stream(**arguments) as stream:
                message = await stream.get_final_message()
        else:
            message = await client.messages.create(**arguments)
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        thinking, text, call = message.content
        assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "look:", "weather", {"city": "Oslo"})
        assert message.stop_reason == "tool_use"
        sent = [block.model_dump(exclude_none=True) for block in message.content]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
        turns = [QUESTION, {"role": "assistant", "content": sent}, {"role": "user", "content": [result]}]
        await client.messages.create(**{**arguments, "messages": turns})
    assert RESULT_TURNS.format(id=call.id, arguments='{"city": "Oslo"}') in tools.prompt()


@pytest.mark.parametrize(
    ("choice", "is_shown", "enforces"),
    [
        ({"type": "auto"}, True, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "weather"}, True, True),
        ({"type": "none"}, False, False),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else str(value),
)
async def test_messages_choose_tools_in_anthropic_s_words(
    make: Make, choice: dict, is_shown: bool, enforces: bool
) -> None:
    tools = make(CALLING)
    body = {"model": MODEL, "max_tokens": 500, "messages": [QUESTION], "tools": [MESSAGES_TOOL], "tool_choice": choice}
    async with tools.api.client() as client:
        answer = (await client.post("/v1/messages", json=body)).json()
    grammar = tools.api.generator.requests[-1].sampling.grammar
    assert (grammar is not None) == enforces and ("<tool weather>" in tools.prompt()) == is_shown
    assert answer["stop_reason"] == ("tool_use" if is_shown else "end_turn")


async def test_a_failed_tool_is_told_to_the_model(make: Make) -> None:
    tools = make("sorry")
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "no"}], "is_error": True}
    turns = [
        QUESTION,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    body = {"model": MODEL, "max_tokens": 50, "messages": turns, "tools": [MESSAGES_TOOL]}
    async with tools.api.client() as client:
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    assert "tool\nError: no<answers t1><|im_end|>\n<|im_start|>user\nso?<|im_end|>" in tools.prompt()


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "<thinks True>"),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, "<thinks False>"),
        ("/v1/messages", {"output_config": {"effort": "high"}}, "<effort high>"),
        ("/v1/responses", {"reasoning": {"effort": "low"}}, "<effort low>"),
        ("/v1/chat/completions", {"thinking": {"type": "disabled"}}, "<thinks False>"),
        ("/v1/chat/completions", {"thinking": {"type": "enabled", "effort": "low"}}, "<effort low>"),
    ],
)
async def test_reasoning_is_switched_by_each_endpoint_s_field(
    make: Make, path: str, fields: dict, expected: str
) -> None:
    tools = make("ok")
    turns = {"input": [QUESTION]} if path == "/v1/responses" else {"messages": [QUESTION]}
    limit = {"max_tokens": 5} if path == "/v1/messages" else {}
    async with tools.api.client() as client:
        response = await client.post(path, json={"model": MODEL, **turns, **limit, **fields})
    assert response.status_code == 200, response.text
    assert expected in tools.prompt()


@pytest.mark.parametrize(
    "fields",
    [{"reasoning": "hm"}, {"reasoning_content": "hm"}, {"reasoning": "x", "reasoning_content": "hm"}],
    ids=lambda fields: "+".join(fields),
)
async def test_earlier_reasoning_has_either_of_its_names(make: Make, fields: dict) -> None:
    tools = make("ok")
    turns = [QUESTION, {"role": "assistant", "content": "rain", **fields}, QUESTION]
    async with tools.api.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": turns})
    assert response.status_code == 200, response.text
    assert "<think>hm</think>rain" in tools.prompt()


async def test_thinking_that_is_not_to_be_shown_is_left_out(make: Make) -> None:
    tools = make("<think>hm</think>ok")
    body = {
        "model": MODEL,
        "max_tokens": 50,
        "messages": [QUESTION],
        "thinking": {"type": "adaptive", "display": "omitted"},
    }
    async with tools.api.client() as client:
        answer = (await client.post("/v1/messages", json=body)).json()
    assert answer["content"] == [{"type": "text", "text": "ok"}]


@pytest.mark.parametrize("named", ["tools", "tool_choice"])
async def test_what_is_wrong_with_tools_is_named(make: Make, named: str) -> None:
    tools = make("ok")
    chosen = {"type": "function", "name": "other"}
    fields = {"tool_choice": chosen} if named == "tool_choice" else {"tools": [RESPONSES_TOOL] * 2}
    body = {"model": MODEL, "input": "a", "tools": [RESPONSES_TOOL], **fields}
    async with tools.api.client() as client:
        response = await client.post("/v1/responses", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == {"tools": "tools[1].name", "tool_choice": "tool_choice"}[named]


class Capital(BaseModel):
    capital: str


async def test_official_client_parses_a_response(make: Make, serve: Serve) -> None:
    tools = make('{"capital": "Oslo"}')
    async with openai_client(await serve(tools.api.app)) as client:
        response = await client.responses.parse(model=MODEL, input="capital of Norway?", text_format=Capital)
    assert response.output_parsed == Capital(capital="Oslo")


@pytest.mark.parametrize(
    ("path", "wanted", "named"),
    [
        ("/v1/responses", lambda schema: {"text": {"format": schema_format(schema)}}, "text.format"),
        ("/v1/messages", lambda schema: {"output_config": {"format": messages_format(schema)}}, "output_config.format"),
    ],
)
async def test_schemas_become_grammars_and_bad_ones_are_named(
    make_api: Callable[..., Api], path: str, wanted: Callable[[object], dict], named: str
) -> None:
    api = make_api(lambda request: [(1,), "stop"])
    turns = {"input": "hi"} if path == "/v1/responses" else {"messages": [QUESTION], "max_tokens": 5}
    async with api.client() as client:
        good = await client.post(path, json={"model": MODEL, **turns, **wanted(SCHEMA)})
        bad = await client.post(path, json={"model": MODEL, **turns, **wanted({"type": "nonsense"})})
    assert good.status_code == 200, good.text
    grammar = api.generator.requests[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema" and '"city"' in grammar.text
    assert bad.status_code == 400
    detail = bad.json()["error"]
    assert detail.get("param", named) == named and named in detail["message"] + detail.get("param", "")
    assert len(api.generator.requests) == 1


def schema_format(schema: object) -> dict:
    return {"type": "json_schema", "name": "city", "schema": schema}


def messages_format(schema: object) -> dict:
    return {"type": "json_schema", "schema": schema}
