"""A `GrammarSpec` becomes a compiled grammar, or an error that says what is wrong with it.

The library counts what it does (symbols, items, lexer states and "fuel") and gives up at limits, so compiling ends
whatever the text is, after the same work on every machine: what the ingress could compile, every rank can. Regular
expressions run as automata that are built as far as they are used; nothing backtracks. References to other documents
are errors: nothing is ever fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.vocabulary import Vocabulary

MAX_BYTES = 256 * 1024
"""Of a spec's text. The library's limits bound its work, but some of it grows with the square of the text."""

_WHITESPACE = r"[ ]?|\n[ ]{0,40}"
"""Between the tokens of JSON: what compact, spaced and indented writing needs. Without a bound, a model may write
whitespace until its tokens are used up."""

_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=20_000,  # about 1 ms
    max_lexer_states=50_000,  # about 75 MB
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Times are the library's own figures. Lower than its defaults, as all rows of a step wait for the slowest: a grammar
that is ambiguous without bound ends its output with an error, after steps of tens of milliseconds at most."""
_MAX_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar at its beginning. Thread-safe, as it is only copied."""

    vocabulary: Vocabulary
    matcher: LLMatcher
    """Never advanced: outputs have copies."""


def compile_grammar(spec: GrammarSpec, vocabulary: Vocabulary) -> CompiledGrammar:
    """Compile. Raises `InvalidRequest`, with param "grammar", for what is malformed, unsupported, too large or matches
    nothing. Releases the interpreter lock while it works."""
    if len(spec.text.encode()) > MAX_BYTES:
        raise _refusal(f"it has more than {MAX_BYTES} bytes")
    matcher = LLMatcher(vocabulary.library, _source(spec), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    probe = matcher.deep_copy()
    probe.compute_bitmask()
    if probe.is_error():
        raise _refusal(probe.get_error())
    if probe.is_stopped() and not probe.is_accepting():
        raise _refusal("nothing matches it")
    return CompiledGrammar(vocabulary, matcher)


def _source(spec: GrammarSpec) -> str:
    """The grammar as the library takes it."""
    try:
        if spec.kind == "json_object":
            return _from_schema('{"type": "object"}')
        if spec.kind == "json_schema":
            return _from_schema(spec.text)
        if spec.kind == "regex":
            return str(LLMatcher.grammar_from_regex(spec.text))
        if spec.kind == "choice":
            return _from_choices(spec.text)
        return str(LLMatcher.grammar_from_lark(any_to_lark(spec.text)))
    except Exception as exc:  # the library's converters raise bare Exception
        raise _refusal(str(exc)) from exc


def _from_schema(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE}))


def _from_choices(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices:
        raise ValueError("expected a list of strings, not empty")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("every choice is a string that is not empty")
    return "start: " + "\n | ".join(json.dumps(choice) for choice in choices)


def _refusal(reason: str) -> InvalidRequest:
    reason = " ".join(reason.replace("<non-verbose/>", "").split())
    if reason.startswith("NoExtension"):
        reason = "nothing matches it"
    return InvalidRequest(f"the grammar cannot be used: {reason[:_MAX_MESSAGE_CHARS]}", param="grammar")
