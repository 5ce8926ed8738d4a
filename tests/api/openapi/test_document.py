"""The API's own description: complete, valid, and true of what the app does with its examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from atom_cluster.api.openapi.document import openapi_document, with_model
from atom_cluster.api.openapi.operation import Example, Operation, operation_of
from atom_cluster.api.openapi.schemas import components
from atom_cluster.api.operating.tokenization_types import TokenizeRequest
from atom_cluster.api.text.tokenizer import Tokenizer
from tests.api.conftest import MODEL, Api

MakeApi = Callable[..., Api]
Json = dict[str, Any]


@pytest.fixture
def api(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [tuple(tokenizer.encode("Paris")), "stop"])


@pytest.fixture
def document(api: Api) -> Json:
    return openapi_document(api.app.routes, model=MODEL)


def validator(document: Json, schema: Json) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def operations(api: Api) -> Iterator[tuple[str, str, Operation]]:
    for route in api.app.routes:
        operation = operation_of(route)
        assert operation is not None, f"{route} does not say what it is"
        (method,) = route.methods
        yield route.path, method, operation


def test_every_route_is_described(api: Api, document: Json) -> None:
    described = {(path.replace(":path", ""), method.lower()) for path, method, _ in operations(api)}
    assert described == {(path, method) for path, item in document["paths"].items() for method in item}
    assert len(described) >= 19


def test_links_lead_from_generations_to_an_operation_and_its_parameters(document: Json) -> None:
    found = [one for item in document["paths"].values() for one in item.values()]
    parameters_of = {one["operationId"]: {it["name"] for it in one["parameters"]} for one in found}
    linked = {one["operationId"]: one["responses"]["200"].get("links", {}) for one in found}
    assert {name for name, links in linked.items() if "timeline" in links} == {
        "post_v1_chat_completions",
        "post_v1_completions",
        "post_v1_responses",
        "post_v1_messages",
    }
    for link in (link for links in linked.values() for link in links.values()):
        assert link["parameters"].keys() <= parameters_of[link["operationId"]]


def test_the_api_s_page_lists_every_route(document: Json) -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    table = page.partition("## Endpoints")[2].partition("\n\n`/openapi.json`")[0]
    for path in document["paths"]:
        shown = path.replace("{model_id}", "{id}").replace("{request_id}", "{id}")
        assert f"`{shown}`" in table


def test_the_document_is_valid_openapi(document: Json) -> None:
    OpenAPIV31SpecValidator(json.loads(json.dumps(document))).validate()


def test_every_field_has_a_description(document: Json) -> None:
    bare = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, entry in schema.get("properties", {}).items()
        if not entry.get("description") and "const" not in entry and len(entry.get("enum", ())) != 1
    ]
    assert bare == []
    assert all(schema.get("description") for schema in document["components"]["schemas"].values())


def test_only_the_served_model_is_a_model(document: Json) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["model"]["enum"] == [MODEL]
    assert schemas["TokenizeRequest"]["properties"]["model"]["enum"] == [MODEL, None]


async def test_examples_are_answered_as_the_document_says(api: Api, document: Json) -> None:
    num_examples = 0
    async with api.client() as client:
        for path, _, operation in operations(api):
            for example in operation.examples:
                num_examples += 1
                body = with_model(example.request, MODEL)
                entry = document["paths"][path]["post"]
                validator(document, entry["requestBody"]["content"]["application/json"]["schema"]).validate(body)
                response = await client.post(path, json=body)
                assert response.status_code == 200, response.text
                assert "x-request-id" in response.headers
                content = entry["responses"]["200"]["content"]
                media_type = response.headers["content-type"].partition(";")[0]
                check_answer(document, content[media_type], response.text, example)
    assert num_examples >= 14


def check_answer(document: Json, content: Json, text: str, example: Example) -> None:
    """Both what the app answered and what the example says it might."""
    if not example.is_streamed:
        for answer in (json.loads(text), with_model(example.answer, MODEL)):
            validator(document, content["schema"]).validate(answer)
        return
    schema = {"anyOf": content["x-event-data"]}
    for stream in (text, with_model(example.answer, MODEL)):
        lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
        assert lines
        for line in lines:
            if line != "[DONE]":
                validator(document, schema).validate(json.loads(line))


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {}, 400),
        ("/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "a"}]}, 404),
        ("/v1/messages", {}, 400),
        ("/v1/responses", {"model": MODEL, "input": 5}, 400),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404),
    ],
)
async def test_errors_have_the_documented_form(api: Api, document: Json, path: str, body: Json, status: int) -> None:
    async with api.client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == status
    entry = document["paths"][path]["post"]["responses"][str(status)]
    validator(document, entry["content"]["application/json"]["schema"]).validate(response.json())


async def test_it_is_served_as_data_and_as_a_page_without_scripts(api: Api, document: Json) -> None:
    async with api.client() as client:
        data, page = await client.get("/openapi.json"), await client.get("/docs")
    assert data.json() == json.loads(json.dumps(document))
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page.text
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in page.text


def test_two_types_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="TokenizeRequest"):
        components([TokenizeRequest, SENT])


SENT = msgspec.defstruct("TokenizeRequest", [("a", int)], module=__name__)
