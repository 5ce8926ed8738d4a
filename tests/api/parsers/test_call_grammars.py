"""Whatever the grammar of a family's calls allows is read as calls, with arguments that the schemas accept."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
import tokenizers
from llguidance import LLMatcher

from atom_cluster.api.answers.pieces import ToolCallArguments, ToolCallBegun, calls_of
from atom_cluster.api.parsers.call_grammars import CALL_WRITERS, CallableTool, CallsToWrite
from atom_cluster.api.parsers.dialect import REASONING_FORMATS, TOOL_FORMATS, Dialect, ToolUse
from atom_cluster.api.parsers.lark_writer import LarkWriter
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.grammar import compile_grammar
from atom_cluster.structured.vocabulary import Vocabulary
from tests.api.parsers.reading import TOOLS
from tests.api.tiny_tokenizers import byte_level

_SEED = 5
_MAX_TOKENS = 600
SCHEMAS = {
    "get_weather": {**TOOLS["get_weather"], "required": ["city", "units"], "additionalProperties": False},
    "set_unit": {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["C", "F"]},
            "steps": {"type": "array", "maxItems": 2},
            "note": {"type": "string", "maxLength": 5},
        },
        "required": ["unit"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """Bytes, and every mark that can be a token."""
    marks = {mark for entry in TOOL_FORMATS.values() for mark in entry.all_marks}
    # Of DeepSeek's elements only the word within their names is one; Qwen3-Coder's are spelt out.
    own = sorted(mark for mark in marks if "DSML" not in mark and not mark.startswith("<function"))
    backend = byte_level()
    backend.add_special_tokens([*own, "｜DSML｜"])
    return backend


@pytest.fixture(scope="module")
def vocabulary(backend: tokenizers.Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizers.Tokenizer.from_str(backend.to_str()), backend.get_vocab_size())


def random_output(matcher: LLMatcher, vocabulary: Vocabulary, rng: random.Random, likely: set[int]) -> list[int] | None:
    """Token ids of some output that the grammar allows; None if it grew too long. `likely` ones make it end soon."""
    token_ids: list[int] = []
    while len(token_ids) < _MAX_TOKENS:
        allowed = [token_id for token_id, bias in enumerate(matcher.compute_logit_bias()) if bias]
        if vocabulary.marker in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return token_ids
        choices = [token_id for token_id in allowed if token_id != vocabulary.marker]
        preferred = [token_id for token_id in choices if token_id in likely]
        token_ids.append(rng.choice(preferred if preferred and rng.random() < 0.8 else choices))
        assert matcher.consume_token(token_ids[-1])
    return None


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("one_call", [True, False])
def test_what_a_grammar_allows_is_read_as_its_calls(
    name: str, one_call: bool, backend: tokenizers.Tokenizer, vocabulary: Vocabulary
) -> None:
    tools = [CallableTool(name=tool, parameters=SCHEMAS[tool], is_strict=True) for tool in SCHEMAS]
    lark = LarkWriter(backend.token_to_id, max_bytes=100_000)
    text = lark.grammar(CALL_WRITERS[name](lark, CallsToWrite(tools=tools, one_call=one_call)))
    compiled = compile_grammar(GrammarSpec(kind="lark", text=text), vocabulary)
    marks = [token_id for token, token_id in backend.get_vocab().items() if len(token) > 1]
    likely = {*marks, *backend.encode('"}\n</]', add_special_tokens=False).ids}
    rng = random.Random(_SEED)
    outputs = [random_output(compiled.matcher.deep_copy(), vocabulary, rng, likely) for _ in range(10)]
    whole = [token_ids for token_ids in outputs if token_ids is not None]
    assert whole
    dialect = Dialect(
        reasoning=REASONING_FORMATS["harmony"] if name == "harmony" else None,
        tools=TOOL_FORMATS[name],
        special_ids_by_mark={},
        choices={},
    )
    use = ToolUse(parameters_by_name=SCHEMAS, one_call=False)
    for token_ids in whole:
        written = backend.decode(token_ids, skip_special_tokens=False)
        parser = dialect.reading(prompt_end="", tools=use).parser()
        pieces = [*parser.feed(written), *parser.finish()]
        assert all(isinstance(piece, (ToolCallBegun, ToolCallArguments)) for piece in pieces), written
        calls = calls_of(pieces)
        assert len(calls) == 1 or (calls and not one_call)
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
