"""/v1/responses over a scripted generator, by OpenAI's client where it can say what is meant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest

from atom_cluster.api.http.request_body import validate
from atom_cluster.api.responses.conversion import chat_request
from atom_cluster.api.responses.requests import ResponsesRequest
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded, RequestFailed
from tests.api.conftest import MODEL, Api, Serve
from tests.api.tiny_tokenizers import TEMPLATE

MakeApi = Callable[..., Api]
BODY = {"model": MODEL, "input": "hi"}


@pytest.fixture
def hello(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [*[(token_id,) for token_id in tokenizer.encode("Hello €")], "stop"])


def client_for(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def post(api: Api, **fields: object) -> tuple[int, dict]:
    async with api.client() as client:
        response = await client.post("/v1/responses", json={**BODY, **fields})
    return response.status_code, response.json()


async def test_official_client_creates_a_response(hello: Api, serve: Serve) -> None:
    hello.generator.num_cached_tokens = 2
    async with client_for(await serve(hello.app)) as client:
        response = await client.responses.create(
            model=MODEL, input="hi", instructions="be short", temperature=0.5, metadata={"a": "b"}
        )
    assert response.output_text == "Hello €"
    assert (response.status, response.temperature, response.metadata) == ("completed", 0.5, {"a": "b"})
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == 2
    request = hello.generator.requests[0]
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(request.token_ids), 9)
    assert request.sampling.temperature == 0.5


async def test_official_client_streams_events(hello: Api, serve: Serve) -> None:
    async with client_for(await serve(hello.app)) as client:
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        raw = [event async for event in await client.responses.create(model=MODEL, input="hi", stream=True)]
    assert final.output_text == "Hello €"
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert "".join(event.delta for event in raw if event.type == "response.output_text.delta") == "Hello €"


async def test_the_wire_has_named_events_and_no_done_mark(hello: Api) -> None:
    async with hello.client() as client:
        response = await client.post("/v1/responses", json={**BODY, "stream": True})
    lines = response.text.split("\n")
    assert lines[0] == "event: response.created" and lines[1].startswith('data: {"type":"response.created"')
    assert "[DONE]" not in response.text


async def test_a_cut_response_is_incomplete(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(lambda request: [tuple(tokenizer.encode("ab")), "length"])
    status, response = await post(api, max_output_tokens=2)
    assert (status, response["status"]) == (200, "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert api.generator.requests[0].sampling.max_tokens == 2


async def test_items_become_the_conversation(hello: Api, tokenizer: Tokenizer) -> None:
    items = [
        {"role": "system", "content": "s"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "a", "annotations": []}],
        },
        {"role": "user", "content": "again"},
    ]
    assert (await post(hello, input=items, instructions="i"))[0] == 200
    turns = [("system", "i"), ("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "again")]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert "message['role']" in TEMPLATE
    assert tokenizer.decode(hello.generator.requests[0].token_ids, skip_special_tokens=False) == expected


def test_items_of_one_turn_are_one_message() -> None:
    """Its thoughts, its text, its calls; what follows calls or text is another turn."""
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"type": "message", "role": "assistant", "content": "a"}
    items = [thought, said, {**call, "call_id": "1"}, {**call, "call_id": "2"}, said, said, thought]
    chat = chat_request(validate(ResponsesRequest, {"model": "m", "input": items}))
    found = [(turn.reasoning_content, turn.content, len(turn.tool_calls or ())) for turn in chat.messages]
    assert found == [("hm", "a", 2), (None, "a", 0), (None, "a", 0), ("hm", "", 0)]


async def test_an_answer_can_be_sent_back(hello: Api) -> None:
    _, first = await post(hello)
    items = [{"role": "user", "content": "hi"}, *first["output"], {"role": "user", "content": "and?"}]
    status, _ = await post(hello, input=items)
    assert status == 200


async def test_log_probabilities_are_sent_if_included(hello: Api) -> None:
    status, response = await post(hello, include=["message.output_text.logprobs"], top_logprobs=2)
    assert status == 200
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 9 and len(logprobs[0]["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///"}]}]}, None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "input"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"stream_options": {}}, "stream_options"),
        ({"priority": 1000}, "priority"),
        ({"n": 2}, "n"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(hello: Api, fields: dict, param: str | None) -> None:
    status, answer = await post(hello, **fields)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"] == (param or "input[0].content[0]")
    assert not hello.generator.requests


async def test_an_unknown_model_is_a_404(hello: Api) -> None:
    status, answer = await post(hello, model="other")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_before_the_first_token_is_a_status(make_api: MakeApi, stream: bool) -> None:
    status, answer = await post(make_api(lambda request: [Overloaded("full")]), stream=stream)
    assert (status, answer["error"]["code"]) == (503, "queue_full")


async def test_an_error_in_the_middle_fails_the_response(make_api: MakeApi, serve: Serve, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    api = make_api(lambda request: [tuple(tokenizer.encode("a")), gate, RequestFailed("replica lost")])
    async with client_for(await serve(api.app)) as client:
        events = []
        async for event in await client.responses.create(model=MODEL, input="hi", stream=True):
            events.append(event)
            gate.set()
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None and events[-1].response.error.message == "replica lost"
