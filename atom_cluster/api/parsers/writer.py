"""Collects the pieces that scripts make of an output, and tidies the white space between them. Knows no format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

from atom_cluster.api.answers.pieces import Piece, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegun

_LINE_ENDS = "\r\n"


def random_call_id() -> str:
    """An id as OpenAI makes them."""
    return f"call_{uuid.uuid4().hex[:24]}"


class PieceWriter:
    """Pieces of one output.

    Formats put line ends between reasoning, content and calls; they belong to none of them. So line ends behind a
    boundary are left out, and white space in front of one: it is held back until it is known what follows. Where a
    boundary has the same on both sides, such as two thoughts, one line end is put between them.
    """

    def __init__(self, *, one_call: bool = False, new_call_id: Callable[[], str] = random_call_id) -> None:
        """`one_call`: the output is complete after its first call."""
        self._pieces: list[Piece] = []
        self._one_call = one_call
        self._new_call_id = new_call_id
        self._held_space: list[str] = []
        self._is_behind_boundary = False
        self._last_kind: type[TextPiece] | type[ReasoningPiece] | None = None
        """Of the last piece, if it was text of either."""
        self._num_calls = 0
        self._has_arguments = False
        self.in_reasoning = False
        self.in_call = False
        self.is_complete = False

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def text(self, text: str) -> None:
        """More content."""
        self._write(text, TextPiece)

    def reasoning(self, text: str) -> None:
        """More reasoning; between `begin_reasoning` and `end_reasoning`."""
        self._write(text, ReasoningPiece)

    def begin_reasoning(self) -> None:
        """What follows is reasoning."""
        self._cross_boundary()
        self.in_reasoning = True

    def end_reasoning(self) -> None:
        """What follows is not reasoning."""
        self._cross_boundary()
        self.in_reasoning = False

    def begin_call(self, name: str, *, call_id: str | None = None) -> None:
        """A tool call begins. `call_id` None: one is made."""
        self._cross_boundary()
        self.in_call = True
        if not self.is_complete:
            self._pieces.append(ToolCallBegun(self._num_calls, call_id or self._new_call_id(), name))
            self._num_calls += 1
            self._last_kind = None
            self._has_arguments = False

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        text = text if self._has_arguments else text.lstrip()
        if text and not self.is_complete:
            self._pieces.append(ToolCallArguments(self._num_calls - 1, text))
            self._has_arguments = True

    def end_call(self) -> None:
        """The call that began last has all of its arguments; where it has none, they are an empty object."""
        if not self._has_arguments:
            self.arguments("{}")
        self._cross_boundary()
        self.in_call = False
        self.is_complete = self.is_complete or self._one_call

    def finish(self) -> None:
        """The output has ended: white space at its end is the model's own, unless only a boundary is before it."""
        if self._held_space:
            kind = ReasoningPiece if self.in_reasoning else TextPiece
            self._append(kind("".join(self._held_space)))
            self._held_space.clear()

    def _cross_boundary(self) -> None:
        self._held_space.clear()
        self._is_behind_boundary = True

    def _write(self, text: str, kind: type[TextPiece] | type[ReasoningPiece]) -> None:
        if self._is_behind_boundary:
            text = text.lstrip(_LINE_ENDS)
            if not text:
                return
            self._is_behind_boundary = False
            if kind is self._last_kind:
                text = "\n" + text
        body = text.rstrip()
        if body:
            self._append(kind("".join([*self._held_space, body])))
            self._held_space.clear()
            self._last_kind = kind
        if len(body) < len(text):
            self._held_space.append(text[len(body) :])

    def _append(self, piece: Piece) -> None:
        if not self.is_complete:
            self._pieces.append(piece)


class ObjectWriter:
    """Writes a call's arguments as a JSON object, value by value, for formats that are not JSON."""

    def __init__(self, out: PieceWriter) -> None:
        self._out = out
        self._num_keys = 0

    def key(self, name: str) -> None:
        """A value follows."""
        self._out.arguments(("{" if self._num_keys == 0 else ", ") + _json_string(name) + ": ")
        self._num_keys += 1

    def value(self, text: str) -> None:
        """A whole value, as JSON."""
        self._out.arguments(text)

    def quote(self) -> None:
        """A string value begins or ends."""
        self._out.arguments('"')

    def characters(self, text: str) -> None:
        """More of a string value, unescaped."""
        self._out.arguments(_json_string(text)[1:-1])

    def end(self) -> None:
        """No more values."""
        self._out.arguments("}" if self._num_keys else "{}")


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
