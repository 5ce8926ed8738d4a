from __future__ import annotations

import pytest

from atom_cluster.api.answers.pieces import TextPiece, ToolCallArguments, ToolCallBegun
from atom_cluster.api.answers.segments import Segmenter, segments_of
from tests.api.scripted_parser import pieces_of

TEXT = "[think]hm[end]look:[call f]{}[call g]{1}[end]done"


def test_segments_are_the_runs_of_one_kind_and_each_call() -> None:
    found = segments_of(pieces_of(TEXT))
    assert [(segment.index, segment.kind, segment.text) for segment in found] == [
        (0, "reasoning", "hm"),
        (1, "text", "look:"),
        (2, "call", "{}"),
        (3, "call", "{1}"),
        (4, "text", "done"),
    ]
    assert [segment.call.name for segment in found if segment.call] == ["f", "g"]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_each_segment_begins_grows_and_ends_once_however_it_arrives(size: int) -> None:
    pieces = pieces_of(TEXT)
    segmenter = Segmenter()
    changes = []
    for start in range(0, len(pieces), size):
        changes += segmenter.feed(pieces[start : start + size])
    changes += segmenter.finish()
    assert [*segmenter.finish()] == []
    by_segment = {index: [c.kind for c in changes if c.segment.index == index] for index in range(5)}
    assert all(kinds[0] == "begin" and kinds[-1] == "end" for kinds in by_segment.values())
    assert all(set(kinds[1:-1]) == {"grow"} for kinds in by_segment.values())
    order = [change.segment.index for change in changes]
    assert order == sorted(order)


def test_a_call_without_arguments_yet_is_a_segment() -> None:
    assert [segment.text for segment in segments_of([ToolCallBegun(0, "c", "f")])] == [""]


def test_empty_text_makes_nothing_grow() -> None:
    changes = [*Segmenter().feed([ToolCallBegun(0, "c", "f"), ToolCallArguments(0, ""), TextPiece("a")])]
    assert [change.kind for change in changes] == ["begin", "end", "begin", "grow"]
