"""Bodies are read within bounds and taken strictly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from atom_cluster.api.anthropic.requests import MessagesRequest
from atom_cluster.api.http.request_body import MAX_DEPTH, MAX_KEYS, MAX_OBJECTS, parse_json_object, validate
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_cluster.api.operating.tokenization_types import DetokenizeRequest
from atom_cluster.api.responses.requests import ResponsesRequest
from atom_cluster.errors import InvalidRequest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans())
def test_every_json_object_is_read_as_it_is(value: dict[str, object], escapes: bool) -> None:
    body = json.dumps(value, ensure_ascii=escapes).encode("utf-8")
    assert parse_json_object(body) == value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"   ", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1} x', "Extra data"),
        (b"[1]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a":' * 100_000, "deeply"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeply"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "deeply"),
        (b'{"a": "\\ud83d\\ude00"', "delimiter"),
        (b'{"a": [' + b"{}, " * MAX_OBJECTS + b"{}]}", "objects"),
        (json.dumps(dict.fromkeys(map(str, range(MAX_KEYS + 1)))).encode(), "keys"),
    ],
)
def test_anything_else_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        parse_json_object(body)
    assert caught.value.code == "invalid_json"


def test_control_characters_and_surrogate_pairs_are_text() -> None:
    assert parse_json_object(b'{"a": "\\u0000\\ud83d\\ude00"}') == {"a": "\x00\U0001f600"}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "did you mean `temperature`"),
        ({"kv_transfer_params": {}}, "kv_transfer_params", "unknown field"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "cat", "content": ""}]},
            "messages[1].role",
            "'user'",
        ),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"x" * 5000: 1}, "x" * 100, "unknown field"),
    ],
)
def test_errors_name_the_field_as_the_client_wrote_it(change: dict[str, object], param: str, message: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **change}
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(ChatCompletionRequest, body)
    assert caught.value.param == param


def test_fields_without_effect_and_null_are_accepted() -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "annotations": []},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        ],
        **dict.fromkeys(["stop", "n", "seed", "max_tokens", "tools", "response_format", "logit_bias"]),
        "user": "u",
        "metadata": {"k": "v"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tool_choice": "none",
        "modalities": ["text"],
    }
    assert validate(ChatCompletionRequest, body).messages[1].content == "b\nc"


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts_come_in_four_shapes(prompt: object, parsed: object) -> None:
    assert validate(CompletionRequest, {"model": "m", "prompt": prompt}).prompt == parsed


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatCompletionRequest, {"messages": [1, 1]}, "messages[0]"),
        (
            ChatCompletionRequest,
            {"messages": [{"role": "assistant", "tool_calls": [1, 1]}]},
            "messages[0].tool_calls[0]",
        ),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}], "stop": [1, 1]}, "stop[0]"),
        (ResponsesRequest, {"input": [1, 1]}, "input[0]"),
        (ResponsesRequest, {"input": [{"role": "user", "content": [1, 1]}]}, "input[0].content[0]"),
        (MessagesRequest, {"max_tokens": 1, "messages": [1, 1]}, "messages[0]"),
        (DetokenizeRequest, {"tokens": ["a", "a"]}, "tokens[0]"),
    ],
)
def test_only_the_first_wrong_element_of_a_list_is_an_error(
    model: type[BaseModel], body: dict[str, object], param: str
) -> None:
    # Millions of errors take gigabytes, and a minute in which nobody else is served.
    known = {"model": "m"} if "model" in model.model_fields else {}
    with pytest.raises(ValidationError) as caught:
        model.model_validate({**known, **body})
    assert caught.value.error_count() == 1
    with pytest.raises(InvalidRequest) as refused:
        validate(model, {**known, **body})
    assert refused.value.param == param
