"""Prompts as part of answers: `echo` and `prompt_logprobs`, as OpenAI and vLLM word them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from atom_cluster.api.text.tokenizer import Tokenizer
from tests.api.conftest import MODEL, Api, Serve
from tests.api.tiny_tokenizers import EOS_ID

MakeApi = Callable[..., Api]
START_ID = EOS_ID - 1


@pytest.fixture
def api(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    """It says "yz", if it may say anything."""
    tokens = [(token_id,) for token_id in tokenizer.encode("yz")]
    return make_api(lambda request: ["length"] if request.sampling.max_tokens == 0 else [*tokens, "length"])


async def complete(api: Api, **fields: Any) -> dict[str, Any]:
    async with api.client() as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_output_begins_with_its_prompt_and_has_the_log_probabilities_of_both(api: Api) -> None:
    choice = (await complete(api, prompt="ab", echo=True, logprobs=1))["choices"][0]
    assert choice == {
        "index": 0,
        "text": "abyz",
        "logprobs": {
            "tokens": ["a", "b", "y", "z"],
            "token_logprobs": [None, -1.5, pytest.approx(-0.88), pytest.approx(-0.89)],
            "top_logprobs": [
                None,
                {"c": -0.25, "b": -1.5},
                {"!": -1.0, "y": pytest.approx(-0.88)},
                {"!": -1.0, "z": pytest.approx(-0.89)},
            ],
            "text_offset": [0, 1, 2, 3],
        },
        "finish_reason": "length",
    }


async def test_without_log_probabilities_only_the_text_is_repeated(api: Api) -> None:
    choice = (await complete(api, prompt="ab", echo=True))["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("abyz", None)
    assert api.generator.requests[-1].sampling.prompt_logprobs is None


async def test_without_output_the_answer_is_the_prompt(api: Api) -> None:
    answer = await complete(api, prompt=["ab", "c"], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [[None, -1.5], [None]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 0)
    assert (await complete(api, prompt="ab", echo=True, max_tokens=0))["choices"][0]["text"] == "ab"


async def test_every_output_repeats_its_own_prompt(api: Api) -> None:
    answer = await complete(api, prompt=["ab", "c"], n=2, echo=True, logprobs=0)
    assert [choice["text"] for choice in answer["choices"]] == ["abyz", "abyz", "cyz", "cyz"]
    assert {tuple(choice["logprobs"]["text_offset"]) for choice in answer["choices"]} == {(0, 1, 2, 3), (0, 1, 2)}


async def test_special_tokens_of_a_text_are_repeated_and_take_their_place(api: Api) -> None:
    choice = (await complete(api, prompt="a<|im_start|>é", echo=True, logprobs=0))["choices"][0]
    assert choice["text"] == "a<|im_start|>éyz"
    assert choice["logprobs"]["tokens"] == ["a", "<|im_start|>", "bytes:\\xc3", "bytes:\\xa9", "y", "z"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 13, 13, 14, 15]


async def test_token_ids_are_repeated_as_text_in_which_special_tokens_are_nothing(
    api: Api, tokenizer: Tokenizer
) -> None:
    prompt = [START_ID, *tokenizer.encode("é!")]
    choice = (await complete(api, prompt=prompt, echo=True, logprobs=0))["choices"][0]
    assert choice["text"] == "é!yz"
    assert choice["logprobs"]["tokens"] == ["<|im_start|>", "bytes:\\xc3", "bytes:\\xa9", "!", "y", "z"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 2, 3]


async def test_prompt_logprobs_are_by_token_id_with_ranks(api: Api, tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    scores = [
        None,
        {
            str(b): {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
            str(c): {"logprob": -0.25, "rank": 1, "decoded_token": "c"},
        },
    ]
    answer = await complete(api, prompt=[a, b], prompt_logprobs=1)
    assert answer["choices"][0]["prompt_logprobs"] == scores
    assert answer["choices"][0]["text"] == "yz" and "prompt_logprobs" not in answer
    async with api.client() as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "ab"}], "prompt_logprobs": 0, "n": 2}
        chat = (await client.post("/v1/chat/completions", json=body)).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["prompt_logprobs"][0] is None and all(len(entry) == 1 for entry in chat["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in chat["choices"][0]


async def test_each_part_of_an_answer_has_the_alternatives_that_were_asked_for_it(api: Api) -> None:
    choice = (await complete(api, prompt="ab", echo=True, logprobs=1, prompt_logprobs=3))["choices"][0]
    assert len(choice["prompt_logprobs"][1]) == 3
    assert choice["logprobs"]["top_logprobs"][1] == {"c": -0.25, "b": -1.5}


async def test_answers_that_did_not_ask_say_nothing_of_their_prompt(api: Api) -> None:
    choice = (await complete(api, prompt="ab", logprobs=0))["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["logprobs"]["tokens"] == ["y", "z"]


async def test_the_official_client_reads_echoes_and_streams_of_them(api: Api, serve: Serve) -> None:
    async with openai.AsyncOpenAI(base_url=f"{await serve(api.app)}/v1", api_key="none", max_retries=0) as client:
        whole = await client.completions.create(model=MODEL, prompt=["ab", "c"], echo=True, logprobs=1)
        stream = await client.completions.create(model=MODEL, prompt=["ab", "c"], echo=True, logprobs=1, stream=True)
        parts: dict[int, list[openai.types.CompletionChoice]] = {0: [], 1: []}
        async for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index].append(choice)
    for choice in whole.choices:
        chunks = parts[choice.index]
        assert chunks[0].text.startswith(("ab", "c")) and len(chunks) > 1
        assert "".join(chunk.text for chunk in chunks) == choice.text
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [entry for chunk in chunks if chunk.logprobs for entry in getattr(chunk.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)
