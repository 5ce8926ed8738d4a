"""Fields of a request that say what its output has to look like: OpenAI's `response_format`, vLLM's names.

They become a `GrammarSpec`, with the name of the field that it came from, so that errors can name it. Compiling it, and
so finding out whether it is any good, is `api/answers/grammars.py`. Knows nothing of HTTP or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from pydantic import Field

from atom_cluster.api.http.api_model import ApiModel
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarKind, GrammarSpec

JsonObject = dict[str, object]

MAX_CHOICES = 10_000


class JsonSchema(ApiModel):
    """A schema and what OpenAI wants to know about it."""

    name: str = Field(min_length=1, max_length=64)
    """Without effect: the model is not shown the schema."""
    description: str | None = None
    """Without effect."""
    schema_: JsonObject = Field(alias="schema")
    """The schema."""
    strict: bool | None = None
    """false: keywords that cannot be enforced are ignored; otherwise they are errors. All others are enforced either
    way."""


class ResponseFormat(ApiModel):
    """OpenAI's way to say it."""

    type: Literal["text", "json_object", "json_schema"]
    """Any text, any JSON object, or JSON that a schema accepts."""
    json_schema: JsonSchema | None = None
    """With the type json_schema, and only with it."""


class StructuredOutputs(ApiModel):
    """vLLM's way to say it: one of these."""

    json_: JsonObject | str | None = Field(None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """The whole output matches this. Without look-around and back references."""
    choice: list[str] | None = Field(None, max_length=MAX_CHOICES)
    """The output is one of these."""
    grammar: str | None = None
    """A context-free grammar, in Lark's syntax or in GBNF."""
    json_object: bool | None = None
    """true: any JSON object."""


class StructuredFields(ApiModel):
    """Fields of all endpoints that generate from OpenAI's first two bodies. At most one of them may say anything."""

    response_format: ResponseFormat | None = None
    """What the output has to look like, in OpenAI's way."""
    structured_outputs: StructuredOutputs | None = None
    """What the output has to look like, in vLLM's way."""
    guided_json: JsonObject | str | None = None
    """A JSON schema: vLLM's older name of `structured_outputs.json`. The next three likewise."""
    guided_regex: str | None = None
    """See `guided_json`."""
    guided_choice: list[str] | None = Field(None, max_length=MAX_CHOICES)
    """See `guided_json`."""
    guided_grammar: str | None = None
    """See `guided_json`."""


@dataclass(frozen=True, slots=True)
class WantedGrammar:
    """What an output has to look like, and which field says so."""

    spec: GrammarSpec
    param: str


def wanted_grammar(body: StructuredFields, *, max_bytes: int) -> WantedGrammar | None:
    """What the body asks for; None: any text. Raises `InvalidRequest` for several wishes, or one that is too long."""
    wishes = list(_wishes(body))
    if len(wishes) > 1:
        names = " and ".join(f"`{wish.param}`" for wish in wishes)
        raise InvalidRequest(f"{names} cannot be combined: give one of them", param=wishes[1].param)
    if wishes and len(wishes[0].spec.text.encode()) > max_bytes:
        raise InvalidRequest(f"`{wishes[0].param}` has at most {max_bytes} bytes", param=wishes[0].param)
    return wishes[0] if wishes else None


def _wishes(body: StructuredFields) -> Iterator[WantedGrammar]:
    if body.response_format is not None:
        yield from _openai_wish(body.response_format)
    yield from _vllm_wishes("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    outputs = body.structured_outputs
    if outputs is not None:
        prefix = "structured_outputs."
        yield from _vllm_wishes(prefix, outputs.json_, outputs.regex, outputs.choice, outputs.grammar)
        if outputs.json_object:
            yield _wish("json_object", "", f"{prefix}json_object")


def _openai_wish(wanted: ResponseFormat) -> Iterator[WantedGrammar]:
    schema = wanted.json_schema
    if (wanted.type == "json_schema") != (schema is not None):
        param = "response_format.json_schema"
        raise InvalidRequest(f"`{param}` goes with the type json_schema, and only with it", param=param)
    if schema is not None:
        is_lenient = schema.strict is False
        yield _schema_wish(schema.schema_, "response_format.json_schema.schema", is_lenient=is_lenient)
    elif wanted.type == "json_object":
        yield _wish("json_object", "", "response_format")


def _vllm_wishes(
    prefix: str, schema: JsonObject | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[WantedGrammar]:
    if schema is not None:
        param = f"{prefix}json"
        yield _schema_wish(_parsed(schema, param) if isinstance(schema, str) else schema, param, is_lenient=False)
    if regex is not None:
        yield _wish("regex", regex, f"{prefix}regex")
    if choice is not None:
        yield _wish("choice", msgspec.json.encode(choice).decode(), f"{prefix}choice")
    if grammar is not None:
        yield _wish("lark", grammar, f"{prefix}grammar")


def _wish(kind: GrammarKind, text: str, param: str) -> WantedGrammar:
    return WantedGrammar(GrammarSpec(kind=kind, text=text), param)


def _schema_wish(schema: Mapping[str, object], param: str, *, is_lenient: bool) -> WantedGrammar:
    # Options of the library that a schema may carry are the server's to choose.
    own = {key: value for key, value in schema.items() if key != "x-guidance"}
    if is_lenient:
        own["x-guidance"] = {"lenient": True}
    try:
        return _wish("json_schema", msgspec.json.encode(own).decode(), param)
    except RecursionError as exc:
        raise InvalidRequest(f"`{param}` is nested too deeply", param=param) from exc


def _parsed(text: str, param: str) -> JsonObject:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"`{param}` is not a JSON object: {exc}", param=param) from exc
