"""/tokenize and /detokenize: the model's tokenizer over HTTP, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.api.conftest import MODEL, Api

MakeApi = Callable[..., Api]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api(lambda request: [(1,), "stop"])


async def post(api: Api, path: str, **body: object) -> tuple[int, dict]:
    async with api.client() as client:
        response = await client.post(path, json=body)
    return response.status_code, response.json()


async def test_a_text_becomes_tokens_and_back(api: Api) -> None:
    status, answer = await post(api, "/tokenize", model=MODEL, prompt="h €<|im_end|>", return_token_strs=True)
    assert status == 200
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert answer["token_strs"][0] == "h" and answer["token_strs"][-1] == "<|im_end|>"
    assert await post(api, "/detokenize", tokens=answer["tokens"]) == (200, {"prompt": "h €<|im_end|>"})


async def test_a_conversation_has_the_tokens_of_its_chat_request(api: Api) -> None:
    async with api.client() as client:
        await client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES})
    _, answer = await post(api, "/tokenize", messages=MESSAGES, add_generation_prompt=True)
    assert tuple(answer["tokens"]) == api.generator.requests[0].token_ids
    assert answer["token_strs"] is None


async def test_an_empty_text_has_no_tokens(api: Api) -> None:
    status, answer = await post(api, "/tokenize", prompt="")
    assert (status, answer["tokens"]) == (200, [])
    assert await post(api, "/detokenize", tokens=[]) == (200, {"prompt": ""})


@pytest.mark.parametrize("length", [513, 200_000])
async def test_more_than_the_context_is_refused(api: Api, length: int) -> None:
    for path, fields, param in (
        ("/tokenize", {"prompt": "a" * length}, "prompt"),
        ("/detokenize", {"tokens": [1] * length}, "tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * length}]}, "messages"),
    ):
        status, answer = await post(api, path, **fields)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == param
    assert (await post(api, "/tokenize", prompt="a" * 512))[1]["count"] == 512


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, 400, "tools"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {}}, 400, "mm_processor_kwargs"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [100_000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens[0]"),
    ],
)
async def test_what_is_wrong_is_named(api: Api, path: str, fields: dict, status: int, param: str) -> None:
    found, answer = await post(api, path, **fields)
    assert (found, answer["error"]["param"]) == (status, param)
