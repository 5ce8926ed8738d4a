"""What an output's text consists of: content, reasoning, tool calls. Knows no format of a model and none of OpenAI's.

An `OutputParser` turns the text of one output into pieces as it arrives; `api/parsers/` has those of model families.
Answer formats word pieces as their endpoint does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's content."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """More of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """The model calls a tool. Its arguments follow: at least one `ToolCallArguments`, if only `{}`, unless the output
    was cut off before."""

    index: int
    """0 for the output's first call, 1 for the second, and so on."""
    call_id: str
    """What a `tool` message names to answer this call."""
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments. Joined, they are JSON text, if the model wrote JSON."""

    index: int
    text: str


Piece = TextPiece | ReasoningPiece | ToolCallBegun | ToolCallArguments


class OutputParser(Protocol):
    """Reads the text of one output. Pieces do not depend on how the text was cut: only where they are cut does."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends within reasoning."""
        ...

    @property
    def in_call(self) -> bool:
        """Whether the text so far ends within a call."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is wanted, such as after the only call that a request allows: the output ends there."""
        ...

    def feed(self, text: str) -> list[Piece]:
        """Pieces that this text makes certain; may be none."""
        ...

    def finish(self) -> list[Piece]:
        """The rest, once the output has ended, wherever that was."""
        ...


class PlainParser:
    """All text is content. Has no state: one serves all outputs."""

    in_reasoning = False
    in_call = False
    is_complete = False

    def feed(self, text: str) -> list[Piece]:
        """See `OutputParser`."""
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        """See `OutputParser`."""
        return []


PLAIN = PlainParser()


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces with neighbours of one kind made one, and empty text left out."""
    result: list[Piece] = []
    texts: list[str] = []
    """Texts of the last entry of `result`, which is replaced when the next one is of another kind."""
    for piece in pieces:
        if isinstance(piece, ToolCallBegun):
            _close(result, texts)
            result.append(piece)
        elif piece.text:
            if not (texts and _is_same_kind(result[-1], piece)):
                _close(result, texts)
                result.append(piece)
            texts.append(piece.text)
    _close(result, texts)
    return result


def text_of(pieces: Iterable[Piece]) -> str:
    """The content."""
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def reasoning_of(pieces: Iterable[Piece]) -> str:
    """The reasoning."""
    return "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))


@dataclass(frozen=True, slots=True)
class WholeToolCall:
    """One call with all of its arguments."""

    call_id: str
    name: str
    arguments: str
    """JSON text, if the model wrote JSON."""


def calls_of(pieces: Iterable[Piece]) -> list[WholeToolCall]:
    """The tool calls, in order, of everything that an output produced."""
    begun: list[ToolCallBegun] = []
    texts: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallBegun):
            begun.append(piece)
        elif isinstance(piece, ToolCallArguments):
            texts.setdefault(piece.index, []).append(piece.text)
    return [WholeToolCall(call.call_id, call.name, "".join(texts.get(call.index, ()))) for call in begun]


def _is_same_kind(one: Piece, other: Piece) -> bool:
    if isinstance(one, ToolCallArguments) and isinstance(other, ToolCallArguments):
        return one.index == other.index
    return type(one) is type(other)


def _close(result: list[Piece], texts: list[str]) -> None:
    """Give the last piece its whole text."""
    if len(texts) > 1:
        last = result[-1]
        text = "".join(texts)
        if isinstance(last, ToolCallArguments):
            result[-1] = ToolCallArguments(last.index, text)
        elif isinstance(last, TextPiece):
            result[-1] = TextPiece(text)
        else:
            result[-1] = ReasoningPiece(text)
    texts.clear()
