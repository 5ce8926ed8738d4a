"""Workloads: lengths, shared prefixes, repeatability, rate."""

from __future__ import annotations

from itertools import islice

import pytest

from benchmarks.workloads import FIRST_TOKEN_ID, Workload, make_prompts, poisson_arrivals


def test_prompts_have_their_length_and_share_exactly_their_prefixes() -> None:
    workload = Workload(num_requests=40, input_len=50, output_len=5, prefix_len=30, num_prefixes=3)
    prompts = make_prompts(workload)
    assert {len(prompt) for prompt in prompts} == {50}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 3
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 40
    assert all(FIRST_TOKEN_ID <= token < workload.vocab_size for prompt in prompts for token in prompt)


def test_without_a_prefix_prompts_differ_from_the_first_token_on() -> None:
    prompts = make_prompts(Workload(num_requests=20, input_len=8, output_len=5))
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 20


def test_the_seed_decides_everything() -> None:
    def make(seed: int) -> list[list[int]]:
        return make_prompts(Workload(num_requests=4, input_len=8, output_len=5, prefix_len=4, seed=seed))

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="prefix_len"):
        Workload(num_requests=1, input_len=8, output_len=5, prefix_len=8)
    with pytest.raises(ValueError, match="vocab_size"):
        Workload(num_requests=1, input_len=8, output_len=5, vocab_size=100)


def test_arrivals_start_at_once_and_keep_the_rate() -> None:
    arrivals = list(islice(poisson_arrivals(20.0, seed=1), 4001))
    assert arrivals[0] == 0
    assert all(earlier < later for earlier, later in zip(arrivals, arrivals[1:]))
    assert arrivals[-1] == pytest.approx(4000 / 20.0, rel=0.05)
