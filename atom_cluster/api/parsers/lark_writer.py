"""Writes grammars of outputs in the dialect of Lark that `GrammarSpec` takes. Knows no format of calls.

Marks that are tokens of the vocabulary are written as those tokens: the same characters spelt in other tokens are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models were shown JSON; free white space would let them write it without end."""

_SLASH = "\\/"
_PROSE = frozenset({"title", "description", "examples", "default", "$comment"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Their keys are names, not words of the schema language."""
_VALUES = frozenset({"enum", "const", "required"})
"""What is in them is no schema."""


class GrammarTooLongError(Exception):
    """A grammar has more bytes than it may have."""


class LarkWriter:
    """Rules of one grammar, and expressions to put into them.

    Whatever writes a rule raises `GrammarTooLongError` once all of them are too long: small requests may ask for large
    grammars, as each parameter of a tool may name the same large schema.
    """

    def __init__(self, token_id: Callable[[str], int | None], *, max_bytes: int) -> None:
        """`token_id` gives a vocabulary's id of a text that is one token."""
        self._token_id = token_id
        self._num_bytes_left = max_bytes
        self._rules: list[str] = []
        self._num_rules = 0
        self._has_text = False

    def is_token(self, mark: str) -> bool:
        """Whether the mark is one token."""
        return self._token_id(mark) is not None

    def mark(self, text: str) -> str:
        """A mark: the token, where it is one."""
        token_id = self._token_id(text)
        return self.literal(text) if token_id is None else f"<[{token_id}]>"

    def literal(self, text: str) -> str:
        """These characters."""
        # The one control character that JSON does not escape, and Lark's strings do not take.
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

    def rule(self, body: str) -> str:
        """A rule of its own; gives its name."""
        name = self._new_name()
        self._add(f"{name}: {body}")
        return name

    def _add(self, rule: str) -> None:
        self._num_bytes_left -= len(rule.encode()) + 1
        if self._num_bytes_left < 0:
            raise GrammarTooLongError
        self._rules.append(rule)

    def _new_name(self) -> str:
        self._num_rules += 1
        return f"r{self._num_rules}"

    def text(self) -> str:
        """Any characters, of no length too. Where it ends has to be told by a token."""
        if not self._has_text:
            self._has_text = True
            self._add(f"TEXT: /{_characters(None)}/")
        return "TEXT"

    def text_up_to(self, close: str, max_chars: int | None = None) -> str:
        """At most so many characters, and the first `close` behind them."""
        if self.is_token(close):
            text = self.text() if max_chars is None else self.rule(f"/{_characters(max_chars)}/")
            return f"{text} {self.mark(close)}"
        name = self._new_name()
        self._add(f"{name}[suffix={self.literal(close)}]: /{_characters(max_chars)}/")
        return name

    def text_before(self, ending: str, max_chars: int | None) -> str:
        """At most so many characters and `ending`, in front of a token."""
        return self.rule(f"/{_characters(max_chars)}{re.escape(ending).replace('/', _SLASH)}/")

    def json(self, schema: Mapping[str, Any], *, is_strict: bool) -> str:
        """JSON that the schema accepts. Not `is_strict`: what of it cannot be enforced is left out."""
        options = {**_JSON_STYLE, **({} if is_strict else {"lenient": True})}
        enforced = {**_without_prose(schema), "x-guidance": options}
        return self.rule("%json " + json.dumps(enforced, ensure_ascii=False))

    def one_of(self, expressions: Sequence[str]) -> str:
        """One of these."""
        return expressions[0] if len(expressions) == 1 else self.rule("\n  | ".join(expressions))

    def repeated(self, expression: str, separator: str, *, only_once: bool) -> str:
        """Once, or once or more."""
        return expression if only_once else f"{expression} ({separator} {expression})*"

    def grammar(self, start: str) -> str:
        """The grammar."""
        rules, self._rules = self._rules, []
        self._add(f"start: {start}")
        return "\n".join([*self._rules, *rules])


def _characters(max_chars: int | None) -> str:
    """A regular expression for any characters, line ends too."""
    return "(?s:.*)" if max_chars is None else f"(?s:.{{0,{max_chars}}})"


def _without_prose(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without what only people and models read: most of the text of most tools."""
    result: dict[str, Any] = {}
    for word, value in schema.items():
        if word in _PROSE:
            continue
        if word in _NAMED_SCHEMAS and isinstance(value, Mapping):
            result[word] = {name: _without_prose_in(entry) for name, entry in value.items()}
        else:
            result[word] = value if word in _VALUES else _without_prose_in(value)
    return result


def _without_prose_in(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_prose(value)
    return [_without_prose_in(entry) for entry in value] if isinstance(value, list) else value
