"""Text of tokens that arrive one by one equals the text of all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.api.text.text_stream import ByteText, WindowText


def byte_window() -> WindowText:
    """A window stream over tokens that are bytes."""
    return WindowText(lambda ids: bytes(ids).decode("utf-8", "replace"), lambda token_id: True)


@given(st.text())
def test_every_piece_of_a_window_is_final_and_pieces_join_to_the_text(text: str) -> None:
    stream = byte_window()
    shown = ""
    for value in text.encode("utf-8"):
        shown += stream.feed((value,))
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@given(st.binary(max_size=64), st.integers(1, 5))
def test_bytes_that_are_no_text_decode_as_they_would_at_once(data: bytes, size: int) -> None:
    stream = ByteText(lambda token_id: bytes([token_id]))
    pieces = [stream.feed(tuple(data[start : start + size])) for start in range(0, len(data), size)]
    assert "".join(pieces) + stream.finish() == data.decode("utf-8", "replace")


def test_a_window_does_not_grow_over_bytes_that_never_become_a_character() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes(ids).decode("utf-8", "replace")

    stream = WindowText(decode, lambda token_id: True)
    text = stream.feed([0xFF] * 1000) + stream.finish()
    assert text == "\ufffd" * 1000
    assert longest <= 16
