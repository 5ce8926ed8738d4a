"""The other endpoints over the quick start's cluster: OpenAI's responses, Anthropic's messages, ids and deadlines."""

from __future__ import annotations

import uuid

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"


def test_every_endpoint_says_the_same(cluster: RunningCluster) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    with (
        openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client,
        anthropic.Anthropic(base_url=cluster.url, api_key="none", max_retries=0) as other,
    ):
        chat = client.chat.completions.create(**body, max_tokens=20)
        text = chat.choices[0].message.content or ""
        assert "Paris" in text
        response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=20)
        with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=20) as stream:
            streamed = stream.get_final_response()
        arguments = {"model": MODEL, "max_tokens": 20, "messages": body["messages"], "extra_body": {"temperature": 0}}
        message = other.messages.create(**arguments)
        with other.messages.stream(**arguments) as events:
            streamed_message = events.get_final_message()
    assert response.output_text == streamed.output_text == text
    assert message.content[0].text == streamed_message.content[0].text == text
    assert response.usage.output_tokens == message.usage.output_tokens == chat.usage.completion_tokens
    num_prompt_tokens = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert response.usage.input_tokens == num_prompt_tokens == chat.usage.prompt_tokens


class City(BaseModel):
    """Without room for further properties, which a small model would go on inventing."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    has_airport: bool


def test_structured_output_through_the_other_endpoints(cluster: RunningCluster) -> None:
    with (
        openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client,
        anthropic.Anthropic(base_url=cluster.url, api_key="none", max_retries=0) as other,
    ):
        response = client.responses.parse(
            model=MODEL, input=QUESTION, text_format=City, max_output_tokens=200, temperature=0
        )
        wanted = {"format": {"type": "json_schema", "schema": City.model_json_schema()}}
        turns = [{"role": "user", "content": QUESTION}]
        message = other.messages.create(
            model=MODEL, max_tokens=200, messages=turns, output_config=wanted, extra_body={"temperature": 0}
        )
    assert isinstance(response.output_parsed, City)
    City.model_validate_json(message.content[0].text)


def test_tokens_are_those_of_the_prompt(cluster: RunningCluster) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    tokens = httpx.post(cluster.url + "/tokenize", json={"messages": messages}).json()
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    usage = httpx.post(cluster.url + "/v1/chat/completions", json=body, timeout=60).json()["usage"]
    assert tokens["count"] == usage["prompt_tokens"]
    text = httpx.post(cluster.url + "/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert QUESTION in text and "<|im_start|>" in text


def test_the_proxy_and_the_ingress_answer_with_one_id(cluster: RunningCluster) -> None:
    own = f"test-{uuid.uuid4().hex}"
    for headers, expected in (({"X-Request-Id": own}, own), ({}, None)):
        answer = httpx.get(cluster.url + "/v1/models", headers=headers)
        (found,) = answer.headers.get_list("x-request-id")
        assert found == (expected or found)


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_ends_at_its_deadline_on_both_legs(cluster: RunningCluster, streams: bool) -> None:
    body = {"model": MODEL, "prompt": f"{uuid.uuid4()} " * 50, "max_tokens": 2000, "ignore_eos": True}
    headers = {"X-Request-Timeout-Ms": "700"}
    answer = httpx.post(cluster.url + "/v1/completions", json={**body, "stream": streams}, headers=headers, timeout=60)
    if not streams:
        assert answer.status_code == 504
    assert '"code":"request_timeout"' in answer.text
    cluster.wait_until_idle()
