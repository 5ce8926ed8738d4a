"""Eight workers under conversations that all begin with the same block: a router by prefix alone sends all to one."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.messages.cluster import (
    CacheEvents,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    RouteQuery,
)
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.routing.state import RouterState
from tests.routing.builders import BLOCK_SIZE, CacheModel, make_card, make_load

NUM_WORKERS = 8
CACHE_BLOCKS = 600
OUTPUT_TOKENS = 64
DECODE_S = 0.5


@dataclass(frozen=True)
class Arrival:
    at_s: float
    hashes: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    hit_ratio: float
    imbalance: float
    """Computed prompt tokens of the busiest worker over the mean."""


def make_conversations(num_requests: int, seed: int) -> list[Arrival]:
    """40 conversations at a time, each turn repeating all before it plus 5-40 new blocks; block 0 is everybody's."""
    rng = random.Random(seed)
    unique = iter(range(1, 10**9))
    histories: list[tuple[int, ...]] = [(0,) for _ in range(40)]
    arrivals = []
    for number in range(num_requests):
        index = rng.randrange(len(histories))
        if len(histories[index]) > 150 or rng.random() < 0.1:
            histories[index] = (0,)
        histories[index] += tuple(next(unique) for _ in range(rng.randint(5, 40)))
        arrivals.append(Arrival(at_s=number * 0.1, hashes=histories[index]))
    return arrivals


class Worker:
    """A replica that computes one prompt after the other at a fixed speed, then decodes for `DECODE_S`."""

    def __init__(self, peer_id: str) -> None:
        self.cache = CacheModel(peer_id, CACHE_BLOCKS)
        self.num_computed_tokens = 0
        self.num_running = 0
        self._prompts: list[tuple[float, int]] = []

    def start(self, now_s: float, hashes: tuple[int, ...], tokens_per_s: float) -> tuple[float, CacheEvents, int]:
        """Returns when the prompt is computed, what that does to the cache, and the blocks found in it."""
        num_hits = self.cache.leading_run(hashes)
        num_tokens = (len(hashes) - num_hits) * BLOCK_SIZE + 1
        began_s = max([now_s, *(end_s for end_s, _ in self._prompts)])
        self._prompts.append((began_s + num_tokens / tokens_per_s, num_tokens))
        self.num_computed_tokens += num_tokens
        self.num_running += 1
        return self._prompts[-1][0], self.cache.use(hashes), num_hits

    def load(self, now_s: float) -> ReplicaLoad:
        self._prompts = [(end_s, num_tokens) for end_s, num_tokens in self._prompts if end_s > now_s]
        waiting_tokens = sum(num_tokens for _, num_tokens in self._prompts)
        return make_load(self.cache.peer_id, running=self.num_running, waiting_tokens=waiting_tokens)


Choose = Callable[[RouteQuery, float], str]


class Cluster:
    """Workers and a router, advanced from event to event in virtual time."""

    def __init__(self, tokens_per_s: float, policy: str) -> None:
        self.workers = {f"w{number}": Worker(f"w{number}") for number in range(NUM_WORKERS)}
        self.state = RouterState(
            config=RoutingConfig.model_validate({"policy": policy}),
            address=PeerAddress(peer_id="router", endpoint="", epoch=0),
            member_timeout_s=1e9,
            min_remote_tokens=16,
            metrics=NullMetrics(),
        )
        for peer_id in self.workers:
            self.state.announce(make_card(peer_id), 0.0)
        self._tokens_per_s = tokens_per_s
        self._tie = iter(range(10**9))
        self._pending: list[tuple[float, int, Callable[[float], None]]] = []

    def run(self, arrivals: list[Arrival], choose: Choose) -> Outcome:
        num_hits = 0
        for query_id, arrival in enumerate(arrivals):
            self._advance(arrival.at_s)
            query = RouteQuery(
                query_id=query_id,
                block_hashes=(arrival.hashes,),
                num_tokens=len(arrival.hashes) * BLOCK_SIZE + 1,
                expected_output_tokens=OUTPUT_TOKENS,
            )
            num_hits += self._serve(query, choose(query, arrival.at_s), arrival.at_s)
        computed = [worker.num_computed_tokens for worker in self.workers.values()]
        return Outcome(
            hit_ratio=num_hits / sum(len(arrival.hashes) for arrival in arrivals),
            imbalance=max(computed) * len(computed) / sum(computed),
        )

    def _serve(self, query: RouteQuery, peer_id: str, now_s: float) -> int:
        worker = self.workers[peer_id]
        prefilled_s, events, num_hits = worker.start(now_s, query.block_hashes[0], self._tokens_per_s)

        def report(at_s: float) -> None:
            self.state.apply(worker.load(at_s), at_s)

        def finish(at_s: float) -> None:
            worker.num_running -= 1
            self.state.done(RequestDone(query.query_id), source="ingress")
            report(at_s)

        self._at(now_s + 0.06, report)
        self._at(prefilled_s, lambda at_s: self.state.apply(events, at_s))
        self._at(prefilled_s + DECODE_S, finish)
        return num_hits

    def _at(self, at_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._pending, (at_s, next(self._tie), action))

    def _advance(self, now_s: float) -> None:
        while self._pending and self._pending[0][0] <= now_s:
            at_s, _, action = heapq.heappop(self._pending)
            action(at_s)


def _by_router(cluster: Cluster) -> Choose:
    def choose(query: RouteQuery, now_s: float) -> str:
        decision = cluster.state.decide(query, source="ingress", now_s=now_s)
        assert decision.decode is not None
        return decision.decode.peer_id

    return choose


def _by_prefix_alone(cluster: Cluster) -> Choose:
    def choose(query: RouteQuery, now_s: float) -> str:
        workers = cluster.workers
        return max(workers, key=lambda peer_id: workers[peer_id].cache.leading_run(query.block_hashes[0]))

    return choose


@pytest.fixture(scope="module", params=[1500.0, 1e6], ids=["loaded", "paced"])
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Outcome]]:
    """Both regimes: prompts queue up; or each request meets idle workers, so that present load says nothing."""
    arrivals = make_conversations(1500, seed=7)
    results = {}
    for policy in ("round_robin", "prefix_and_load"):
        cluster = Cluster(request.param, policy)
        results[policy] = cluster.run(arrivals, _by_router(cluster))
    cluster = Cluster(request.param, "round_robin")
    results["prefix_alone"] = cluster.run(arrivals, _by_prefix_alone(cluster))
    yield results


def test_the_workload_is_one_that_collapses_by_prefix_alone(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["prefix_alone"].imbalance > 7.5


def test_the_policy_keeps_the_workers_even(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["prefix_and_load"].imbalance <= 1.3


def test_the_policy_hits_at_least_twice_as_often_as_round_robin(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["prefix_and_load"].hit_ratio >= 2 * outcomes["round_robin"].hit_ratio
    assert outcomes["prefix_and_load"].hit_ratio > outcomes["prefix_alone"].hit_ratio
