"""Tools and reasoning over HTTP: what clients get of what a model writes, whole and streamed, and what it may write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel

from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.serving import ApiConfig
from atom_cluster.errors import RequestFailed
from tests.api.conftest import MODEL, Api
from tests.api.fake_generator import Script, Step
from tests.api.test_routes import MakeApi
from tests.api.tiny_tokenizers import byte_level, write_model_directory
from tests.api.tool_templates import TEMPLATES

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris €", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ANSWER = f"<think>\nLet me think.\n</think>\n\nLook: \n{CALL}\n{NOW}"


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")
TOOLS = [WEATHER, {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes as Qwen3 does. Two of its marks are special tokens, two are not."""
    directory = write_model_directory(tmp_path_factory.mktemp("qwen"), max_model_len=4096)
    backend = byte_level()
    backend.add_tokens(list(MARKS[2:]))
    backend.add_special_tokens(list(MARKS[:2]))
    backend.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": backend.get_vocab_size()}))
    (directory / "chat_template.jinja").write_text(TEMPLATES["hermes"])
    return directory


@pytest.fixture
def service(directory: Path) -> Iterator[TokenizerService]:
    service = TokenizerService.from_directory(directory)
    yield service
    service.close()


@pytest.fixture
def tokens(service: TokenizerService) -> Callable[[str], list[int]]:
    return lambda text: service.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def make_api(directory: Path, service: TokenizerService) -> MakeApi:
    def make(script: Script, **limits: object) -> Api:
        return Api(directory, service, script, ApiConfig.model_validate(limits))

    return make


Say = Callable[..., Api]


@pytest.fixture
def say(make_api: MakeApi, tokens: Callable[[str], list[int]]) -> Say:
    """An API whose model says a text, so many tokens at a time."""

    def make(text: str, *, num_at_once: int = 1, **limits: object) -> Api:
        ids = tokens(text)
        steps: list[Step] = [tuple(ids[start : start + num_at_once]) for start in range(0, len(ids), num_at_once)]
        return make_api(lambda request: [*steps, "stop"], **limits)

    return make


def client_of(api: Api) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://api/v1", http_client=api.client(), max_retries=0)


async def post(api: Api, **fields: object) -> dict:
    async with api.client() as client:
        return (await client.post("/v1/chat/completions", json={**BODY, **fields})).json()


async def test_an_answer_has_reasoning_content_and_calls(say: Say, tokens: Callable[[str], list[int]]) -> None:
    answer = await post(say(ANSWER))
    choice = answer["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("Let me think.", "Look:")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": '{"city": "Paris €", "days": 3}'},
        {"name": "now", "arguments": "{}"},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(tokens(ANSWER))
    # The opening mark is one token; the tokens up to and with the closing one count.
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(tokens("\nLet me think.\n</think>"))}


@pytest.mark.parametrize("num_at_once", [1, 2, 5, 1000])
async def test_a_stream_has_the_same_answer(say: Say, num_at_once: int) -> None:
    whole = (await post(say(ANSWER)))["choices"][0]["message"]
    api = say(ANSWER, num_at_once=num_at_once)
    body = {**BODY, "stream_options": {"include_usage": True}}
    async with client_of(api) as client, client.chat.completions.stream(**body) as stream:
        events = [event async for event in stream]
        completion = await stream.get_final_completion()
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == whole["content"]
    assert choice.message.reasoning_content == whole["reasoning_content"]
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        call["function"]["arguments"] for call in whole["tool_calls"]
    ]
    assert choice.message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris €", days=3)
    assert completion.usage.completion_tokens_details.reasoning_tokens == 16
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == ["get_weather", "now"]


async def test_a_client_that_parses_gets_its_objects(say: Say) -> None:
    async with client_of(say(ANSWER)) as client:
        completion = await client.chat.completions.parse(**{**BODY, "tools": [WEATHER]})
    (call, _) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Paris €", days=3)


class Note(BaseModel):
    text: str


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, of what it has put there
async def test_what_a_client_has_parsed_goes_back_with_the_turn(say: Say) -> None:
    """Its objects stay in the message, which is added to the conversation as it is."""
    api = say(ANSWER)
    async with client_of(api) as client:
        turn = (await client.chat.completions.parse(**{**BODY, "tools": [WEATHER]})).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in turn.tool_calls]
        await client.chat.completions.create(**{**BODY, "messages": [*BODY["messages"], turn, *results]})
    api = say('{"text": "hm"}')
    async with client_of(api) as client:
        asked = {"model": MODEL, "messages": BODY["messages"]}
        turn = (await client.chat.completions.parse(**asked, response_format=Note)).choices[0].message
        assert turn.parsed == Note(text="hm")
        await client.chat.completions.create(**{**asked, "messages": [*BODY["messages"], turn, *BODY["messages"]]})
    prompt = api.parts["tokenizer"].tokenizer.decode(api.generator.requests[-1].token_ids, skip_special_tokens=False)
    assert prompt.count('{"text": "hm"}') == 1


async def test_an_assistant_s_turn_goes_back_as_it_came(say: Say) -> None:
    api = say(ANSWER)
    message = (await post(api))["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "it rains"} for call in message["tool_calls"]]
    await post(api, messages=[*BODY["messages"], message, *results])
    prompt = api.parts["tokenizer"].tokenizer.decode(api.generator.requests[-1].token_ids, skip_special_tokens=False)
    assert prompt.count('<tool_call>\n{"name": "') == 2 and prompt.count("it rains") == 2


async def test_past_arguments_that_are_no_text_are_given_as_they_were_written(say: Say) -> None:
    api = say("ok")
    arguments = r'{"city": "\ud800"}'
    turn = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "now", "arguments": arguments}}]}
    await post(api, messages=[*BODY["messages"], turn, {"role": "tool", "tool_call_id": "c", "content": "x"}])
    prompt = api.parts["tokenizer"].tokenizer.decode(api.generator.requests[-1].token_ids, skip_special_tokens=False)
    assert r"\ud800" in prompt


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("fields", [{"parallel_tool_calls": False}, {"tool_choice": NAMED}], ids=["only_one", "named"])
async def test_one_call_ends_the_output_where_no_more_are_wanted(
    say: Say, tokens: Callable[[str], list[int]], fields: dict
) -> None:
    api = say(ANSWER)
    answer = await post(api, **fields)
    choice = answer["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] == len(tokens(ANSWER.partition("\n</tool_call>")[0]))
    assert not api.generator.open_ids


async def test_reasoning_is_left_out_on_request_and_counted_all_the_same(say: Say) -> None:
    answer = await post(say(ANSWER), include_reasoning=False)
    assert "reasoning_content" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 16
    async with client_of(say(ANSWER)) as client:
        stream = await client.chat.completions.create(**BODY, stream=True, extra_body={"include_reasoning": False})
        deltas = [chunk.choices[0].delta async for chunk in stream]
    assert all(getattr(delta, "reasoning_content", None) is None for delta in deltas)
    assert "".join(delta.content or "" for delta in deltas) == "Look:"


async def test_without_tools_calls_are_text_and_completions_are_read_as_they_are(say: Say) -> None:
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        choice = (await post(say(f"ok {NOW}"), **fields))["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": f"ok {NOW}"}
        assert choice["finish_reason"] == "stop"
    async with say(ANSWER).client() as client:
        answer = (await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})).json()
    assert answer["choices"][0]["text"] == ANSWER.replace("<think>", "").replace("</think>", "")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", '<tool_call>{"name": "f"', "<tool_call>{}</tool_call>", '<tool_call>{"name": 3}</tool_call> and'],
)
async def test_a_malformed_call_is_content(say: Say, text: str) -> None:
    choice = (await post(say(text)))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == "stop"


async def test_arguments_that_are_cut_off_are_given_as_far_as_they_go(make_api: MakeApi, tokens: Callable) -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa'
    choice = (await post(make_api(lambda request: [tuple(tokens(text)), "length"])))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Pa'


@pytest.mark.parametrize(("stop", "finish_reason"), [("days", "stop"), ("</tool", "tool_calls"), ("and", "tool_calls")])
async def test_a_call_that_a_stop_string_cut_off_is_none_to_run(say: Say, stop: str, finish_reason: str) -> None:
    choice = (await post(say(f"<think>ok</think>{CALL} and"), stop=[stop]))["choices"][0]
    assert choice["finish_reason"] == finish_reason
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments == ('{"city": "Paris €", "' if stop == "days" else '{"city": "Paris €", "days": 3}')


async def test_each_output_is_read_by_itself(make_api: MakeApi, tokens: Callable[[str], list[int]]) -> None:
    """Parsers live where the text is made: outputs, engines and their handoffs do not know of them."""
    answers = [ANSWER, "plain", f"<think>hm</think>{NOW}"]
    turn = iter(answers)

    def script(request: object) -> Iterable[Step]:
        return [*((token_id,) for token_id in tokens(next(turn))), "stop"]

    choices = (await post(make_api(script), n=3))["choices"]
    found = {(choice["message"]["content"], len(choice["message"].get("tool_calls", ()))) for choice in choices}
    assert found == {("Look:", 2), ("plain", 0), (None, 1)}


async def test_an_error_behind_half_a_call_is_told_as_one(
    make_api: MakeApi, tokens: Callable[[str], list[int]]
) -> None:
    ids = tuple(tokens(CALL)[:40])
    api = make_api(lambda request: [ids, RequestFailed("gone")])
    async with api.client() as client:
        response = await client.post("/v1/chat/completions", json={**BODY, "stream": True})
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["message"] == "gone"


async def test_log_probabilities_cover_every_token(say: Say, tokens: Callable[[str], list[int]]) -> None:
    choice = (await post(say(ANSWER), logprobs=True))["choices"][0]
    assert len(choice["logprobs"]["content"]) == len(tokens(ANSWER))


async def grammar_of(api: Api, **fields: object) -> str | None:
    answer = await post(api, **fields)
    assert "choices" in answer, answer
    grammar = api.generator.requests[-1].sampling.grammar
    return None if grammar is None else grammar.text


async def test_calls_that_are_required_are_enforced(say: Say) -> None:
    required = await grammar_of(say(CALL), tool_choice="required")
    assert required is not None and "get_weather" in required and "now" in required
    named = {"type": "function", "function": {"name": "now"}}
    only = await grammar_of(say(NOW), tool_choice=named)
    assert only is not None and "get_weather" not in only and "now" in only
    # The first tool is strict: what the model may write as its call is enforced once it calls.
    assert "get_weather" in (await grammar_of(say(CALL)) or "")
    assert await grammar_of(say(CALL), tools=TOOLS[1:]) is None
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    either = await grammar_of(say(CALL), tools=TOOLS[1:], response_format=schema)
    assert either is not None and "now" in either and "|" in either


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_grammar": 'start: "a"'}, "guided_grammar"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://x/y"}}}],
            },
            "tool_choice",
        ),
    ],
)
async def test_what_cannot_be_enforced_is_refused(say: Say, fields: dict, param: str) -> None:
    assert (await post(say(NOW), **fields))["error"]["param"] == param
