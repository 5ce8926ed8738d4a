"""Calls of a real model whose grammar is enforced, read back: from the request to the arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import pytest

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.api.answers.answer_grammar import chat_grammar
from atom_cluster.api.answers.pieces import calls_of, text_of
from atom_cluster.api.answers.prompts import chat_prompt
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.openai.tools import tool_use
from atom_cluster.api.parsers.dialect import choose_dialect
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.tools.demo_model import demo_model_dir
from tests.api.tool_templates import TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(demo_model_dir(), max_model_len=1024, device="cpu", num_threads=1) as engine:
        yield engine


@pytest.mark.demo_model
def test_a_model_that_never_saw_tools_calls_them_right(engine: LLMEngine) -> None:
    """As one that did would: the grammar binds it, at any temperature. In a format whose values are not JSON."""
    tokenizer = Tokenizer.from_directory(demo_model_dir())
    template = ChatTemplate(TEMPLATES["qwen3_coder"], special_tokens={})
    dialect = choose_dialect(tool_parser="auto", reasoning_parser="none", template=template, tokenizer=tokenizer)
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    body = {"model": "m", "messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": [tool]}
    request = validate(ChatCompletionRequest, {**body, "tool_choice": "required", "parallel_tool_calls": False})
    prompt = chat_prompt(request, tokenizer=tokenizer, template=template, max_tokens=900)
    wanted = chat_grammar(request, dialect=dialect, prompt_end=prompt.end, tokenizer=tokenizer, max_bytes=60_000)
    assert wanted is not None
    sampling = [SamplingParams(max_tokens=100, temperature=1.5, seed=seed, grammar=wanted.spec) for seed in range(2)]
    for output in engine.generate([list(prompt.token_ids)] * 2, sampling):
        parser = dialect.reading(prompt_end=prompt.end, tools=tool_use(request)).parser()
        pieces = [*parser.feed(tokenizer.decode(output["token_ids"])), *parser.finish()]
        (call,) = calls_of(pieces)
        assert call.name == "get_weather" and text_of(pieces) == ""
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
