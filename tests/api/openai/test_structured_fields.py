"""What clients say about the structure of outputs, and what reaches the generator of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable

import pytest

from atom_cluster.api.answers.grammars import GrammarService
from atom_cluster.errors import InvalidRequest, Overloaded
from atom_cluster.messages.requests import GrammarSpec, SamplingParams
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.vocabulary import Vocabulary
from tests.api.conftest import Api
from tests.structured.vocabularies import word_vocabulary

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi"}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


def json_schema(schema: object = SCHEMA, **more: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api(lambda request: [(72,), "stop"])


async def sent(api: Api, body: dict, path: str = "/v1/chat/completions") -> SamplingParams:
    """Sampling parameters of the one output."""
    async with api.client() as client:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
    return api.generator.requests[-1].sampling


async def refused(api: Api, body: dict, path: str = "/v1/chat/completions") -> tuple[str, str]:
    async with api.client() as client:
        response = await client.post(path, json=body)
        assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": json_schema(strict=True)}, "json_schema", SCHEMA),
        ({"response_format": json_schema(strict=False)}, "json_schema", {**SCHEMA, "x-guidance": {"lenient": True}}),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps({**SCHEMA, "x-guidance": {"lenient": True}})}, "json_schema", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_grammar": 'root ::= "a"'}, "lark", 'root ::= "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ["a"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {}, "response_format": {"type": "text"}, "guided_regex": None}, None, ""),
    ],
)
async def test_a_field_becomes_a_grammar(api: Api, fields: dict, kind: str | None, text: object) -> None:
    for body, path in ((CHAT, "/v1/chat/completions"), (COMPLETION, "/v1/completions")):
        grammar = (await sent(api, {**body, **fields}, path)).grammar
        if kind is None:
            assert grammar is None
            continue
        assert grammar is not None
        assert (grammar.kind, grammar.after) == (kind, ())
        found = grammar.text if isinstance(text, str) else json.loads(grammar.text)
        assert found == text
        if isinstance(text, dict):
            assert list(found["properties"]) == ["b", "a"], "the order of properties is that of the output"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
        ({"response_format": {**json_schema(), "type": "text"}}, "response_format.json_schema", "goes with"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", ""),
        ({"response_format": json_schema({"type": "strin"})}, "response_format.json_schema.schema", "strin"),
        ({"response_format": json_schema({"$ref": "http://x/y"})}, "response_format.json_schema.schema", "http"),
        ({"response_format": json_schema({"$ref": "#"})}, "response_format.json_schema.schema", "matches"),
        ({"response_format": json_schema({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema", "65536"),
        ({"guided_json": "["}, "guided_json", "not a JSON object"),
        ({"guided_json": "[]"}, "guided_json", "not a JSON object"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"guided_choice": []}, "guided_choice", "not empty"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "x"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "cannot be combined"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "cannot be combined"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "cannot be combined"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", ""),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "05"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "five"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5", ""),
        ({"logit_bias": {str(token_id): 1 for token_id in range(301)}}, "logit_bias", "300"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(api: Api, fields: dict, param: str, message: str) -> None:
    found, text = await refused(api, {**CHAT, **fields})
    assert found == param
    assert message in text


async def test_biases_reach_the_generator(api: Api) -> None:
    sampling = await sent(api, {**CHAT, "logit_bias": {"5": -100, "0": 2.5}})
    assert sampling.logit_bias == ((5, -100.0), (0, 2.5))


async def test_limits_are_those_of_the_configuration(make_api: Callable[..., Api]) -> None:
    api = make_api(lambda request: [(72,), "stop"], max_grammar_bytes=64, max_logit_biases=1)
    assert (await refused(api, {**CHAT, "guided_regex": "a" * 65}))[0] == "guided_regex"
    assert (await refused(api, {**CHAT, "logit_bias": {"1": 1, "2": 1}}))[0] == "logit_bias"


async def test_a_grammar_that_takes_too_long_is_refused_and_others_behind_it_come_again_later() -> None:
    may_go_on = threading.Event()

    def load() -> Vocabulary:
        assert may_go_on.wait(20.0)
        return word_vocabulary()

    service = GrammarService(GrammarCompiler(load), timeout_s=0.05)
    with pytest.raises(InvalidRequest, match="longer than 0.05 s") as caught:
        await service.check(GrammarSpec(kind="regex", text="a"), param="guided_regex")
    assert caught.value.param == "guided_regex"
    with pytest.raises(Overloaded):
        await service.check(GrammarSpec(kind="regex", text="b"), param="guided_regex")
    may_go_on.set()
    service = GrammarService(GrammarCompiler(word_vocabulary), timeout_s=20.0)
    await service.check(GrammarSpec(kind="regex", text="b"), param="guided_regex")
    service.close()


async def test_grammars_that_nobody_waits_for_any_more_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom_cluster.api.answers.grammars._MAX_PENDING", 2)
    may_go_on = threading.Event()

    def load() -> Vocabulary:
        assert may_go_on.wait(20.0)
        return word_vocabulary()

    service = GrammarService(GrammarCompiler(load), timeout_s=0.01)
    for text in ("a", "b"):
        with pytest.raises((InvalidRequest, Overloaded), match="compile"):
            await service.check(GrammarSpec(kind="regex", text=text), param="guided_regex")
    with pytest.raises(Overloaded, match="too many"):
        await service.check(GrammarSpec(kind="regex", text="c"), param="guided_regex")
    may_go_on.set()
    while True:
        with contextlib.suppress(InvalidRequest, Overloaded):
            await service.check(GrammarSpec(kind="regex", text="c"), param="guided_regex")
            break
        await asyncio.sleep(0.01)
    service.close()


async def test_without_a_compiler_there_is_no_structured_output() -> None:
    with pytest.raises(InvalidRequest, match="no structured output"):
        await GrammarService(None, timeout_s=1.0).check(GrammarSpec(kind="json_object"), param="response_format")
