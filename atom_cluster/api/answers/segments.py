"""An output's pieces become segments: runs of one kind, each of which a reader of the stream sees begin, grow and end.

/v1/responses calls them items and /v1/messages calls them blocks. Knows nothing of how either words them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from atom_cluster.api.answers.pieces import Piece, ReasoningPiece, TextPiece, ToolCallBegun

SegmentKind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Segment:
    """One run of text or reasoning, or one tool call."""

    index: int
    """0 for the output's first segment, 1 for the second, and so on."""
    kind: SegmentKind
    call: ToolCallBegun | None = None
    """Of a call."""
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far; of a call, its arguments."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to a segment next."""

    kind: Literal["begin", "grow", "end"]
    segment: Segment
    text: str = ""
    """What it grows by."""


class Segmenter:
    """Segments of one output. Calls follow each other: the arguments of one are complete before the next begins."""

    def __init__(self) -> None:
        self._current: Segment | None = None
        self._num_segments = 0

    def feed(self, pieces: Iterable[Piece]) -> Iterator[Change]:
        """What these pieces change."""
        for piece in pieces:
            if isinstance(piece, ToolCallBegun):
                yield from self._begin("call", piece)
                continue
            kind: SegmentKind = "call"
            if isinstance(piece, TextPiece | ReasoningPiece):
                kind = "text" if isinstance(piece, TextPiece) else "reasoning"
            if self._current is None or self._current.kind != kind:
                yield from self._begin(kind)
            if self._current is not None and piece.text:
                self._current.texts.append(piece.text)
                yield Change("grow", self._current, piece.text)

    def finish(self) -> Iterator[Change]:
        """The output has ended."""
        if self._current is not None:
            yield Change("end", self._current)
        self._current = None

    def _begin(self, kind: SegmentKind, call: ToolCallBegun | None = None) -> Iterator[Change]:
        yield from self.finish()
        self._current = Segment(self._num_segments, kind, call)
        self._num_segments += 1
        yield Change("begin", self._current)


def segments_of(pieces: Iterable[Piece]) -> list[Segment]:
    """The segments of everything that an output produced."""
    segmenter = Segmenter()
    return [change.segment for change in [*segmenter.feed(pieces), *segmenter.finish()] if change.kind == "end"]
