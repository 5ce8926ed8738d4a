"""Stop strings are found at the first place where one completes, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.api.text.stop_strings import StopMatcher

letters = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def output_until_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What the matcher must give, by trying every end position."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(letters, stop_lists, st.lists(st.integers(0, 24), max_size=6))
def test_result_does_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(tuple(stops))
    bounds = [0, *sorted(cuts), len(text)]
    output = "".join(matcher.push(text[start:end]) for start, end in zip(bounds, bounds[1:]))
    if matcher.matched is None:
        output += matcher.finish()
    assert (output, matcher.matched) == output_until_stop(text, stops)


@given(letters, stop_lists)
def test_pushed_text_is_never_part_of_a_stop_string_found_later(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    expected, _ = output_until_stop(text, stops)
    output = ""
    for char in text:
        output += matcher.push(char)
        assert expected.startswith(output)


def test_text_is_kept_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(("</end>",))
    assert matcher.push("a </e") == "a "
    assert matcher.push("x") == "</ex"
    assert matcher.push("<") == ""
    assert matcher.finish() == "<"


def test_nothing_is_output_after_a_match() -> None:
    matcher = StopMatcher(("stop",))
    assert matcher.push("go stop go") == "go "
    assert matcher.matched == "stop"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""
