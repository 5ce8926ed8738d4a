"""The ring of errors stays small, whatever happens."""

from __future__ import annotations

import msgspec

from atom_cluster.observability.recent_errors import MAX_MESSAGE_LENGTH, MAX_NOTES, RecentErrors


def test_the_newest_are_kept_and_equal_ones_are_one() -> None:
    now_s = 100.0
    errors = RecentErrors(lambda: now_s)
    errors.note("EngineLost", "gone")
    now_s = 101.0
    errors.note("Overloaded", "full")
    now_s = 102.0
    errors.note("EngineLost", "gone")
    assert [(note.kind, note.at_s, note.count) for note in errors.notes()] == [
        ("Overloaded", 101.0, 1),
        ("EngineLost", 102.0, 2),
    ]


def test_neither_number_nor_length_has_no_bound() -> None:
    errors = RecentErrors()
    for number in range(1000):
        errors.note("EngineLost", f"{number} " + "x" * 10_000)
    notes = errors.notes()
    assert len(notes) == MAX_NOTES and notes[-1].message.startswith("999 ")
    assert len(msgspec.json.encode(notes)) < MAX_NOTES * (MAX_MESSAGE_LENGTH + 120)
