"""Runs parsers of families over texts, in one piece or in many."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from atom_cluster.api.answers.pieces import Piece, joined
from atom_cluster.api.parsers import harmony
from atom_cluster.api.parsers.answer import ReasoningFormat, ScriptParser, read_answer
from atom_cluster.api.parsers.calls import CallContext, ToolFormat
from atom_cluster.api.parsers.reader import Reader
from atom_cluster.api.parsers.values import ToolSchemas
from atom_cluster.api.parsers.writer import PieceWriter

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "units": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
            "where": {"$ref": "#/$defs/Place"},
        },
        "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
    "now": {"type": "object", "properties": {}},
}


def make_parser(
    tools: ToolFormat | None = None,
    reasoning: ReasoningFormat | None = None,
    *,
    opens: bool = False,
    one_call: bool = False,
) -> ScriptParser:
    numbers = itertools.count()
    out = PieceWriter(one_call=one_call, new_call_id=lambda: f"id-{next(numbers)}")
    reader = Reader()
    context = CallContext(reader=reader, out=out, schemas=ToolSchemas(TOOLS))
    if reasoning is harmony.REASONING:
        return ScriptParser(harmony.read_harmony(context, has_tools=tools is not None), reader, out)
    script = read_answer(context, reasoning=reasoning, tools=tools, opens_in_reasoning=opens)
    return ScriptParser(script, reader, out)


def pieces_of(parser: ScriptParser, chunks: Iterable[str]) -> list[Piece]:
    pieces: list[Piece] = []
    for chunk in chunks:
        pieces += parser.feed(chunk)
    return joined(pieces + parser.finish())


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces that end at these places."""
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends)]
