"""Structured output of the demo model, prefill and decode apart, by OpenAI's client."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pydantic
import pytest

from benchmarks.structured_output import ask_cluster
from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"


def test_streamed_outputs_validate(cluster: RunningCluster) -> None:
    tally = asyncio.run(ask_cluster(f"{cluster.url}/v1", num_requests=6, concurrency=6, max_tokens=300))
    assert (tally.num_valid, tally.wrong, tally.finish_reasons) == (6, [], {"stop": 6})


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


def test_the_client_parses_into_a_model_and_bad_grammars_harm_nobody(cluster: RunningCluster) -> None:
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": "Name a city."}]
    answer = client.chat.completions.parse(
        model=MODEL, messages=question, response_format=City, temperature=0, max_tokens=80
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    for fields, param in (
        ({"guided_regex": "(a+)+("}, "guided_regex"),
        ({"guided_json": {"$ref": "http://169.254.169.254/"}}, "guided_json"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
    ):
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4, **fields}
        refused = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    word = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=8, extra_body={"guided_choice": ["three", "four"]}
    )
    assert word.choices[0].text in ("three", "four")
