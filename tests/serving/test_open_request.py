"""A request over its engines: what the next one is told, and which failures of an engine are its client's."""

from __future__ import annotations

from collections.abc import Set

import msgspec
import pytest

from atom_cluster.api.generator import GenerateInput
from atom_cluster.errors import (
    AtomClusterError,
    EngineLost,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestFailed,
    RequestTimeout,
)
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import PromptScore, SamplingParams, TokenDelta
from atom_cluster.serving.open_request import MAX_PLACEMENTS, OpenRequest
from atom_cluster.units import Deadline
from tests.fakes import VirtualClock

AVOID_S = 3.0
EVERYBODY = {
    PeerAddress(peer_id=name, endpoint="tcp://127.0.0.1:2", epoch=1)
    for name in ("engine", "other", "last", *(f"engine{number}" for number in range(MAX_PLACEMENTS)))
}
PREFILL = PeerAddress(peer_id="prefill", endpoint="tcp://127.0.0.1:1", epoch=1)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def opened(clock: VirtualClock) -> OpenRequest:
    sampling = SamplingParams(seed=5, max_tokens=9)
    request = GenerateInput(request_id="r", token_ids=(7, 8), sampling=sampling)
    return OpenRequest(request, timeout_s=60.0, avoid_s=AVOID_S, clock=clock)


def engine(name: str, epoch: int = 1) -> PeerAddress:
    return PeerAddress(peer_id=name, endpoint="tcp://127.0.0.1:2", epoch=epoch)


def lose(opened: OpenRequest, lost: PeerAddress, *, present: Set[PeerAddress] = frozenset()) -> None:
    """An engine that has the request is out of reach."""
    opened.place(prefill=None, eos_token_ids=())
    opened.fail(EngineLost("silent", may_return=True), lost, present=present)


def delta(first_index: int, *token_ids: int, cached: int = 0) -> TokenDelta:
    return TokenDelta(request_id="wire", first_index=first_index, token_ids=token_ids, num_cached_tokens=cached)


def test_the_next_engine_is_told_all_that_the_client_has(opened: OpenRequest) -> None:
    first = opened.place(prefill=PREFILL, eos_token_ids=(1,))
    opened.take(delta(0, 20))
    opened.take(delta(1, 21, 22))
    second = opened.place(prefill=None, eos_token_ids=(1,))
    assert (first.emitted, second.emitted) == ((), (20, 21, 22))
    assert first.token_ids == second.token_ids == (7, 8)
    assert first.sampling == second.sampling and second.sampling.seed == 5
    assert (first.prefill, second.prefill) == (PREFILL, None)
    assert (opened.known_token_ids, opened.num_emitted) == ((7, 8, 20, 21, 22), 3)
    assert first.deadline_s is not None and second.deadline_s is not None and second.deadline_s <= first.deadline_s


def test_engines_are_told_the_priority_and_what_is_left_of_the_client_s_time(clock: VirtualClock) -> None:
    request = GenerateInput(
        request_id="r", token_ids=(7,), sampling=SamplingParams(seed=5), priority=-3, deadline=Deadline.after(5000.0)
    )
    for timeout_s, most_s in ((60_000.0, 5000.0), (2000.0, 2000.0)):
        opened = OpenRequest(request, timeout_s=timeout_s, avoid_s=AVOID_S, clock=clock)
        message = opened.place(prefill=None, eos_token_ids=())
        assert message.priority == -3
        assert message.deadline_s is not None and most_s - 1000 < message.deadline_s <= most_s


def test_each_placement_has_an_id_of_its_own_and_the_client_sees_one(opened: OpenRequest) -> None:
    ids = [opened.place(prefill=None, eos_token_ids=()).request_id for _ in range(3)]
    assert ids == ["r", "r#2", "r#3"]
    assert opened.take(delta(0, 20)).request_id == "r"


def test_cached_tokens_are_those_that_the_engine_of_the_first_token_found(opened: OpenRequest) -> None:
    opened.place(prefill=None, eos_token_ids=())
    opened.place(prefill=None, eos_token_ids=())
    assert opened.take(delta(0, 20, cached=1)).num_cached_tokens == 1
    opened.place(prefill=None, eos_token_ids=())
    assert opened.take(delta(1, 21, cached=2)).num_cached_tokens == 1


def test_a_prompt_is_scored_again_until_its_scores_were_given_out() -> None:
    sampling = SamplingParams(seed=5, max_tokens=9, prompt_logprobs=1)
    opened = OpenRequest(
        GenerateInput(request_id="r", token_ids=(7, 8), sampling=sampling), timeout_s=60.0, avoid_s=AVOID_S
    )
    placed = [opened.place(prefill=None, eos_token_ids=()) for _ in range(2)]
    assert [message.sampling.prompt_logprobs for message in placed] == [1, 1]
    assert opened.wants_prompt_scores
    scores = (None, PromptScore(-1.0, 1))
    opened.take(msgspec.structs.replace(delta(0, 20), prompt_logprobs=scores))
    assert not opened.wants_prompt_scores
    assert opened.place(prefill=None, eos_token_ids=()).sampling.prompt_logprobs is None


def test_engines_may_be_lost_a_few_times_and_are_avoided_for_a_while(opened: OpenRequest, clock: VirtualClock) -> None:
    for number in range(MAX_PLACEMENTS - 1):
        opened.place(prefill=None, eos_token_ids=())
        opened.fail(EngineLost("gone"), engine(f"engine{number}"), present=EVERYBODY)
        clock.sleep(1.0)
    assert opened.avoided() == {"engine2", "engine3"}
    opened.place(prefill=None, eos_token_ids=())
    with pytest.raises(RequestFailed, match=f"{MAX_PLACEMENTS} engines were lost") as caught:
        opened.fail(EngineLost("gone"), engine("last"), present=EVERYBODY)
    assert not isinstance(caught.value, EngineLost)


def test_engines_that_are_out_of_reach_count_while_they_are(opened: OpenRequest) -> None:
    """A request that ends the processes of its engines: each is another one."""
    for number in range(MAX_PLACEMENTS - 1):
        lose(opened, engine("engine", epoch=number), present={engine("engine", epoch=number + 1), engine("other")})
    with pytest.raises(RequestFailed, match=f"{MAX_PLACEMENTS} engines were lost"):
        lose(opened, engine("engine", epoch=MAX_PLACEMENTS - 1), present={engine("other")})


def test_an_engine_that_is_slow_again_and_again_is_not_lost(opened: OpenRequest) -> None:
    for _ in range(10 * MAX_PLACEMENTS):
        lose(opened, engine("only"))


def test_engines_that_came_back_count_no_more_and_those_that_did_not_do(opened: OpenRequest) -> None:
    names = [f"engine{number}" for number in range(3 * MAX_PLACEMENTS)]
    for number, name in enumerate(names):
        lose(opened, engine(name), present={engine(other) for other in names[: max(0, number - 1)]})
    for number in range(MAX_PLACEMENTS - 3):
        opened.place(prefill=None, eos_token_ids=())
        opened.fail(EngineLost("it says so itself"), engine(f"failed{number}"), present=set())
    with pytest.raises(RequestFailed, match="engines were lost"):
        lose(opened, engine("last"))


def test_engines_that_are_not_ready_may_refuse_any_number_of_times(opened: OpenRequest, clock: VirtualClock) -> None:
    for _ in range(3 * MAX_PLACEMENTS):
        opened.place(prefill=None, eos_token_ids=())
        opened.fail(NotReady("draining", retry_after_s=0.1), engine("engine"), present=EVERYBODY)
        assert opened.avoided() == {"engine"}
        clock.sleep(AVOID_S)
        assert opened.avoided() == set()


def test_a_full_queue_refuses_new_requests_only(opened: OpenRequest, clock: VirtualClock) -> None:
    opened.place(prefill=None, eos_token_ids=())
    with pytest.raises(Overloaded):
        opened.fail(Overloaded("full", retry_after_s=0.5), engine("engine"), present=EVERYBODY)
    opened.fail(EngineLost("gone"), engine("engine"), present=EVERYBODY)
    opened.place(prefill=None, eos_token_ids=())
    opened.fail(Overloaded("full", retry_after_s=0.5), engine("other"), present=EVERYBODY)
    assert opened.avoided() == {"engine", "other"}
    clock.sleep(0.5)
    assert opened.avoided() == {"engine"}


def test_a_full_queue_is_looked_at_again_soon_whatever_it_tells_clients(
    opened: OpenRequest, clock: VirtualClock
) -> None:
    opened.has_waited = True
    opened.place(prefill=None, eos_token_ids=())
    opened.fail(Overloaded("full", retry_after_s=60.0), engine("engine"), present=EVERYBODY)
    clock.sleep(AVOID_S)
    assert opened.avoided() == set()


def test_a_request_that_waited_for_an_engine_waits_for_its_queue_as_well(opened: OpenRequest) -> None:
    opened.has_waited = True
    opened.place(prefill=None, eos_token_ids=())
    opened.fail(Overloaded("full", retry_after_s=0.5), engine("engine"), present=EVERYBODY)
    assert opened.avoided() == {"engine"}


@pytest.mark.parametrize("error", [InvalidRequest("bad", param="seed"), RequestTimeout("late"), RequestFailed("bug")])
def test_other_errors_are_the_answer(opened: OpenRequest, error: AtomClusterError) -> None:
    opened.place(prefill=None, eos_token_ids=())
    with pytest.raises(type(error)):
        opened.fail(error, engine("engine"), present=EVERYBODY)
