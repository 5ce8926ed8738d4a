"""What a key may use, counted by a clock of the tests' own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.api.protection.budgets import Bucket, Budget
from atom_cluster.config.protection import RateLimits
from atom_cluster.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Clock, *, num_sharers: int = 1, **limits: int) -> Budget:
    return Budget("the key k", RateLimits.model_validate(limits), num_sharers=num_sharers, clock=clock)


def test_a_minutes_requests_may_come_at_once_and_then_one_after_the_other() -> None:
    clock = Clock()
    budget = make(clock, requests_per_minute=6)
    for _ in range(6):
        budget.admit(0).close()
    with pytest.raises(RateLimited, match="the key k: at most 6 requests per minute") as caught:
        budget.admit(0)
    assert caught.value.limit == "requests_per_minute"
    assert caught.value.retry_after_s == pytest.approx(10)
    clock.now_s += 10
    budget.admit(0).close()
    with pytest.raises(RateLimited):
        budget.admit(0)


def test_what_was_used_takes_the_place_of_the_estimate_and_may_be_owed() -> None:
    clock = Clock()
    budget = make(clock, tokens_per_minute=600)
    first = budget.admit(100)
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "500"
    first.note_used(num_prompt_tokens=50, num_output_tokens=10)
    first.note_used(num_prompt_tokens=0, num_output_tokens=40)
    first.close()
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "500"
    greedy = budget.admit(10)
    greedy.note_used(num_prompt_tokens=10, num_output_tokens=990)
    greedy.close()
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as caught:
        budget.admit(0)
    assert (caught.value.limit, caught.value.retry_after_s) == ("tokens_per_minute", pytest.approx(50.1))
    clock.now_s += 50.2
    budget.admit(0).close()


def test_a_request_that_used_nothing_gives_its_estimate_back() -> None:
    budget = make(Clock(), tokens_per_minute=600)
    budget.admit(500).close()
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "600"


def test_a_prompt_larger_than_a_minutes_tokens_waits_for_a_full_bucket_and_not_for_ever() -> None:
    clock = Clock()
    budget = make(clock, tokens_per_minute=60)
    admission = budget.admit(10_000)
    admission.note_used(num_prompt_tokens=30, num_output_tokens=0)
    admission.close()
    with pytest.raises(RateLimited) as caught:
        budget.admit(10_000)
    assert caught.value.retry_after_s == pytest.approx(30)


def test_so_many_at_the_same_time_and_no_more() -> None:
    budget = make(Clock(), concurrent_requests=2)
    first, _ = budget.admit(0), budget.admit(0)
    with pytest.raises(RateLimited, match="at most 2 requests at the same time") as caught:
        budget.admit(0)
    assert caught.value.limit == "concurrent_requests"
    first.close()
    budget.admit(0)


def test_who_has_too_many_open_is_told_to_come_back_when_they_will_have_ended() -> None:
    clock = Clock()
    budget = make(clock, concurrent_requests=10)
    admissions = [budget.admit(0) for _ in range(10)]
    for _ in range(30):
        clock.now_s += 2.0
        admissions.pop(0).close()
        admissions.append(budget.admit(0))
    with pytest.raises(RateLimited) as caught:
        budget.admit(0)
    assert 10 <= caught.value.retry_after_s <= 20


def test_a_refusal_takes_nothing() -> None:
    budget = make(Clock(), requests_per_minute=10, tokens_per_minute=100, concurrent_requests=1)
    budget.admit(10)
    before = budget.headers()
    with pytest.raises(RateLimited):
        budget.admit(10)
    assert budget.headers() == before
    assert (before["x-ratelimit-remaining-requests"], before["x-ratelimit-remaining-tokens"]) == ("9", "90")


def test_each_ingress_enforces_its_share() -> None:
    clock = Clock()
    budgets = [make(clock, num_sharers=4, requests_per_minute=40, concurrent_requests=2) for _ in range(4)]
    for budget in budgets:
        assert budget.headers()["x-ratelimit-limit-requests"] == "10"
        for _ in range(10):
            budget.admit(0).close()
        with pytest.raises(RateLimited) as caught:
            budget.admit(0)
        assert caught.value.retry_after_s == pytest.approx(6)
    # A share of less than one is one: a key that may do something may do it anywhere.
    clock.now_s += 60
    budgets[0].admit(0)
    with pytest.raises(RateLimited, match="at the same time"):
        budgets[0].admit(0)


def test_without_limits_there_is_nothing_to_tell() -> None:
    budget = make(Clock())
    for _ in range(1000):
        budget.admit(10**6)
    assert budget.headers() == {}


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), max_size=50), st.integers(1, 1000))
def test_never_more_than_a_minutes_worth_and_what_time_gives(steps: list[tuple[float, float]], limit: int) -> None:
    clock = Clock()
    bucket = Bucket(limit, clock)
    began_s, taken = clock.now_s, 0.0
    for wait_s, amount in steps:
        clock.now_s += wait_s
        if bucket.wait_s(amount) == 0 and amount <= bucket.capacity:
            bucket.take(amount)
            taken += amount
    assert taken <= limit + (clock.now_s - began_s) * limit / 60 + 1e-6
