"""Pieces of an output."""

from __future__ import annotations

from atom_cluster.api.answers.pieces import (
    PLAIN,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallArguments,
    ToolCallBegun,
    WholeToolCall,
    calls_of,
    joined,
    reasoning_of,
    text_of,
)

PIECES: list[Piece] = [
    ReasoningPiece("a"),
    ReasoningPiece("b"),
    TextPiece(""),
    TextPiece("c"),
    TextPiece("d"),
    ToolCallBegun(0, "i", "f"),
    ToolCallArguments(0, "{"),
    ToolCallArguments(0, "}"),
    ToolCallBegun(1, "j", "g"),
    ToolCallArguments(1, ""),
    ToolCallArguments(1, "{}"),
    TextPiece("e"),
]


def test_neighbours_of_one_kind_become_one() -> None:
    assert joined(PIECES) == [
        ReasoningPiece("ab"),
        TextPiece("cd"),
        ToolCallBegun(0, "i", "f"),
        ToolCallArguments(0, "{}"),
        ToolCallBegun(1, "j", "g"),
        ToolCallArguments(1, "{}"),
        TextPiece("e"),
    ]
    assert joined([]) == [] and joined([TextPiece("")]) == []


def test_content_reasoning_and_calls_are_told_apart() -> None:
    assert (text_of(PIECES), reasoning_of(PIECES)) == ("cde", "ab")
    assert calls_of(PIECES) == [WholeToolCall("i", "f", "{}"), WholeToolCall("j", "g", "{}")]


def test_plain_text_is_content_at_once() -> None:
    assert PLAIN.feed("<think>") == [TextPiece("<think>")]
    assert PLAIN.feed("") == [] and PLAIN.finish() == []
