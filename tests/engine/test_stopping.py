from __future__ import annotations

import math

import msgspec
import pytest

from atom_cluster.engine.stopping import finish_reason, validate_sampling
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import SamplingParams

EOS = frozenset({2})


def reason(token_id: int, num_output: int = 3, num_known: int = 10, **sampling: object) -> str | None:
    params = msgspec.convert({"max_tokens": 5, **sampling}, SamplingParams)
    return finish_reason(
        token_id, num_output=num_output, num_known=num_known, max_model_len=20, sampling=params, eos=EOS
    )


def test_output_goes_on_until_something_ends_it() -> None:
    assert reason(7) is None


def test_end_of_sequence_and_stop_tokens_end_an_output() -> None:
    assert reason(2) == "stop"
    assert reason(7, stop_token_ids=[7]) == "stop"


def test_the_end_of_sequence_can_be_ignored_but_stop_tokens_cannot() -> None:
    assert reason(2, ignore_eos=True) is None
    assert reason(2, ignore_eos=True, stop_token_ids=[2]) == "stop"


def test_nothing_but_length_ends_an_output_before_min_tokens() -> None:
    assert reason(2, min_tokens=4) is None
    assert reason(2, num_output=4, min_tokens=4) == "stop"
    assert reason(2, num_output=5, min_tokens=9) == "length"


def test_length_ends_an_output_at_max_tokens_and_at_the_context_limit() -> None:
    assert reason(7, num_output=5) == "length"
    assert reason(7, num_known=20) == "length"
    assert reason(7, num_output=5, num_known=19, max_tokens=None) is None


def test_a_last_token_that_also_stops_is_a_stop() -> None:
    assert reason(2, num_output=5) == "stop"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("top_k", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("n", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        validate_sampling(msgspec.structs.replace(SamplingParams(), **{name: value}))
    assert caught.value.param == name


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop strings"):
        validate_sampling(SamplingParams(stop_strings=("a", "")))


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    validate_sampling(SamplingParams(temperature=0, top_p=1, min_p=1, repetition_penalty=10, presence_penalty=-2))
    validate_sampling(SamplingParams(max_tokens=None, logprobs=0, top_k=0))
