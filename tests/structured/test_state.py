"""Masks of one output, position by position, against the rules written down in `GrammarState`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.grammar import compile_grammar
from atom_cluster.structured.masks import MaskFiller, MaskRequest
from atom_cluster.structured.state import GrammarState
from tests.structured.vocabularies import END, id_of, ids_of, word_vocabulary

VOCABULARY = word_vocabulary()
YES = GrammarSpec(kind="choice", text='["yes", "yes please"]')
OBJECT = GrammarSpec(kind="json_object")
THINK = id_of("</think>")


def begin(spec: GrammarSpec, **options: object) -> GrammarState:
    settings: dict[str, object] = {"eos_token_ids": [END], "after": spec.after, **options}
    return GrammarState(compile_grammar(spec, VOCABULARY), **settings)  # type: ignore[arg-type]


def masks(state: GrammarState, drafts: Sequence[int] = ()) -> list[set[int]]:
    """Allowed tokens at each position."""
    words = MaskFiller().fill([MaskRequest(state, tuple(drafts))], VOCABULARY.num_words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : VOCABULARY.vocab_size]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def spelt(*texts: str) -> set[int]:
    return {id_of(text) for text in texts}


EVERYTHING = set(range(VOCABULARY.vocab_size))


def test_only_what_fits_is_allowed_and_an_end_only_where_the_grammar_may_end() -> None:
    state = begin(YES)
    assert masks(state) == [spelt("yes")]
    state.advance(ids_of("ye"))
    assert masks(state) == [spelt("s")]
    state.advance(ids_of("s"))
    assert masks(state) == [spelt(" ", " please") | {END}]
    state.advance([id_of(" please")])
    assert masks(state) == [{END}]
    assert not state.is_over
    state.advance([END])
    assert (state.is_over, state.error, masks(state)) == (True, None, [EVERYTHING])


def test_there_is_a_mask_along_each_draft_and_the_state_stays_where_it_is() -> None:
    state = begin(YES)
    drafts = [id_of("yes"), *ids_of(" p")]
    expected = [spelt("yes"), spelt(" ", " please") | {END}, spelt("p"), spelt("l")]
    assert masks(state, drafts) == expected
    assert masks(state, drafts) == expected
    # Behind a draft that does not fit, and behind the end, anything: nothing is drawn there for good.
    assert masks(state, [id_of("yes"), id_of("x"), id_of("y")]) == [*expected[:2], EVERYTHING, EVERYTHING]
    assert masks(state, [id_of("yes"), END]) == [*expected[:2], EVERYTHING]
    state.advance([id_of("yes"), id_of(" please")])
    assert masks(state, [END, END]) == [{END}, EVERYTHING, EVERYTHING]


def test_before_the_marker_everything_is_allowed_and_the_grammar_may_begin_within_drafts() -> None:
    state = begin(GrammarSpec(kind="choice", text='["yes"]', after=(*ids_of("a"), THINK)))
    assert masks(state) == [EVERYTHING]
    state.advance([*ids_of("xa"), id_of("b"), THINK])
    assert not state.applies
    drafts = [*ids_of("a"), THINK, id_of("y")]
    assert masks(state, drafts) == [EVERYTHING, EVERYTHING, spelt("yes"), spelt("e")]
    assert masks(state, [END, *drafts]) == [EVERYTHING] * 5
    state.advance(ids_of("a"))
    assert masks(state, [THINK]) == [EVERYTHING, spelt("yes")]
    state.advance([THINK])
    assert state.applies
    assert masks(state) == [spelt("yes")]


def test_no_end_before_the_least_number_of_tokens_unless_nothing_else_is_left() -> None:
    state = begin(YES, min_tokens=5)
    state.advance([id_of("yes")])
    assert masks(state) == [spelt(" ", " please")]
    state.advance([id_of(" please")])
    assert masks(state) == [{END}]
    free = begin(GrammarSpec(kind="choice", text='["yes"]', after=(THINK,)), min_tokens=2)
    assert masks(free, [5, 5]) == [EVERYTHING - {END}, EVERYTHING - {END}, EVERYTHING]


def test_stop_tokens_are_ends_too_but_stay_text_where_the_grammar_has_them() -> None:
    state = begin(YES, stop_token_ids=[id_of("y"), id_of("x"), 10**6])
    assert masks(state) == [spelt("yes")]
    state.advance([id_of("yes")])
    assert masks(state) == [spelt(" ", " please", "y", "x") | {END}]
    state.advance([id_of("x")])
    assert state.is_over


def test_a_token_that_does_not_fit_is_an_error_of_this_output() -> None:
    state = begin(YES)
    state.advance(ids_of("yx"))
    assert state.error is not None
    assert "does not fit" in state.error
    assert masks(state, [1]) == [EVERYTHING, EVERYTHING]


def test_rows_of_the_model_without_token_are_never_allowed_nor_is_the_marker() -> None:
    assert VOCABULARY.marker < VOCABULARY.vocab_size
    state = begin(GrammarSpec(kind="regex", text="(?s:.*)"))
    assert not masks(state)[0] & set(range(VOCABULARY.marker, VOCABULARY.vocab_size))
    assert END in masks(state)[0]
    assert THINK not in masks(state)[0]


def test_special_tokens_may_be_named_in_a_grammar() -> None:
    state = begin(GrammarSpec(kind="lark", text='start: <think> "y" </think>'))
    assert masks(state) == [{id_of("<think>")}]
    state.advance([id_of("<think>"), id_of("y")])
    assert masks(state) == [{THINK}]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_several_outputs_with_drafts_get_what_each_gets_alone_token_by_token(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.sampled_from(['{"a": [1, tr', '{"yes":', "{", '{"a":{}}']), min_size=1, max_size=4))
    drafts = [data.draw(st.lists(st.integers(0, END), max_size=4)) for _ in texts]
    states = []
    for text in texts:
        states.append(begin(OBJECT))
        states[-1].advance(ids_of(text))
    requests = [MaskRequest(state, tuple(draft)) for state, draft in zip(states, drafts)]
    together = MaskFiller().fill(requests, VOCABULARY.num_words)
    first = 0
    for text, draft in zip(texts, drafts):
        alone = begin(OBJECT)
        alone.advance(ids_of(text))
        for position in range(len(draft) + 1):
            assert (
                together[first + position] == MaskFiller().fill([MaskRequest(alone)], VOCABULARY.num_words)[0]
            ).all()
            if position < len(draft):
                alone.advance([draft[position]])
        first += len(draft) + 1


def test_a_grammar_that_grows_too_complex_ends_its_output_with_an_error() -> None:
    state = begin(GrammarSpec(kind="lark", text="start: a\na: /[a-z]/ a | /[a-z]/ a a | /x/"))
    while state.error is None:
        masks(state)
        state.advance(ids_of("x") * 40)
    assert state.error is not None
    assert "max is 1000" in state.error
    assert masks(state) == [EVERYTHING]
