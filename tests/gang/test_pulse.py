"""Ranks that fall silent are noticed, and not those that a thread had no time to hear."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import zmq

from atom_cluster.gang.pulse import Context, PulseClient, PulseServer
from atom_cluster.link.auth import Authenticator, ClusterKey
from tests.fakes import VirtualClock

KEY = ClusterKey.from_secret(b"a secret of the gang")
SILENCE_S = 0.4


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context()
    authenticator = Authenticator(context, KEY)
    yield context
    authenticator.close()
    context.term()


def test_a_rank_that_says_nothing_is_silent_after_a_while(context: Context) -> None:
    server = PulseServer(context, KEY, host="127.0.0.1", silence_s=SILENCE_S)
    server.watch(frozenset({1, 2}))
    client = PulseClient(context, KEY, endpoint=server.endpoint, rank=1, silence_s=3.0)
    deadline_s = time.monotonic() + 10
    while server.silent_ranks() != [2]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    client.close()
    server.close()


def test_time_that_the_thread_of_rank_0_did_not_live_is_no_silence(context: Context) -> None:
    clock = VirtualClock(1000.0)
    server = PulseServer(context, KEY, host="127.0.0.1", silence_s=SILENCE_S, clock=clock)
    server.watch(frozenset({1}))
    clock.sleep(100.0)
    assert server.silent_ranks() == []
    deadline_s = time.monotonic() + 10
    while not server.silent_ranks():  # it looks many times, and hears nothing
        assert time.monotonic() < deadline_s
        clock.sleep(SILENCE_S / 100)
        time.sleep(0.001)
    server.close()


def test_nor_is_that_of_a_follower_s(context: Context) -> None:
    server = PulseServer(context, KEY, host="127.0.0.1", silence_s=SILENCE_S)
    looks = itertools.count()
    num_looks = 0

    def clock() -> float:
        nonlocal num_looks
        num_looks = next(looks)
        return 1000.0 * num_looks  # it stands still between any two looks

    client = PulseClient(context, KEY, endpoint=server.endpoint, rank=1, silence_s=2.0, clock=clock)
    deadline_s = time.monotonic() + 10
    while num_looks < 15:
        assert not client.gone.is_set() and time.monotonic() < deadline_s
        time.sleep(0.01)
    assert not client.gone.is_set()
    client.close()
    server.close()
