"""The ingress's client against scripted engines and a scripted router on real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import NotReady, Overloaded, RequestFailed, RequestTimeout
from atom_cluster.link.codec import Message
from atom_cluster.messages.cluster import Membership, RouteDecision
from atom_cluster.messages.requests import CancelRequest, EngineRequest, TokenDelta
from atom_cluster.observability.metrics import REQUESTS_REPLAYED, ROUTER_QUERY_S
from atom_cluster.serving.open_request import MAX_PLACEMENTS
from tests.serving.conftest import eventually
from tests.serving.scripted import (
    AVOID_S,
    TIMEOUT_S,
    Cluster,
    Peer,
    count_up,
    ignore,
    refuse,
    refuse_to_place,
    request_of,
    say,
    say_an_error,
    say_one_token,
    say_one_token_and_drain,
    say_one_token_and_fail,
    skip_a_token,
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.start()
    yield cluster
    await cluster.close()


async def test_requests_go_where_the_router_says(cluster: Cluster) -> None:
    first, second = await cluster.add("first", ignore), await cluster.add("second", count_up)
    cluster.order = [second.endpoint.address] * 20
    results = await asyncio.gather(*(cluster.generate(f"r{number}", 5 + number) for number in range(20)))
    assert results == [list(range(5 + number)) for number in range(20)]
    assert first.received == []
    (hashes,) = cluster.queries[0].block_hashes
    assert len(hashes) == 2  # ten tokens in blocks of four


async def test_a_silent_router_is_not_waited_for() -> None:
    cluster = Cluster(query_timeout_s=0.1)
    cluster.router_answers = False
    await cluster.start()
    await cluster.add("only", count_up)
    assert await cluster.generate() == [0, 1, 2, 3, 4]
    await cluster.close()


async def test_a_new_router_that_knows_nobody_yet_does_not_make_the_ingress_forget(cluster: Cluster) -> None:
    await cluster.add("only", count_up)
    newer = Peer("newer router", refuse_to_place)
    await newer.endpoint.start()
    cluster.client.update(Membership(router=newer.endpoint.address, members=()))
    assert await cluster.generate() == [0, 1, 2, 3, 4]
    await newer.endpoint.close()


async def test_without_any_engine_the_request_is_refused(cluster: Cluster) -> None:
    with pytest.raises(NotReady):
        await cluster.generate()


async def test_a_new_ingress_waits_for_the_engines_of_a_cluster_that_was_there_before(cluster: Cluster) -> None:
    cluster.client.has_had_engines = True
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: cluster.client.has_open_requests)
    await cluster.add("late", count_up)
    assert await running == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [refuse, ignore])
async def test_a_request_without_a_token_moves_to_another_engine(
    cluster: Cluster, bad: Callable[[Peer, str, Message], None]
) -> None:
    first, second = await cluster.add("first", bad), await cluster.add("second", count_up)
    cluster.order = [first.endpoint.address, second.endpoint.address]
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(first.received) == 1)
    if bad is ignore:
        cluster.client.lose("first")
    assert await running == [0, 1, 2, 3, 4]
    assert cluster.queries[1].excluded == ("first",)


@pytest.mark.parametrize("bad", [say_one_token, say_one_token_and_fail])
async def test_a_request_goes_on_with_another_engine_behind_the_tokens_it_has(
    cluster: Cluster, bad: Callable[[Peer, str, Message], None]
) -> None:
    first, second = await cluster.add("first", bad), await cluster.add("second", count_up)
    cluster.order = [first.endpoint.address, second.endpoint.address]
    deltas = [delta async for delta in cut_after_first_token(cluster, "first")]
    assert [(delta.first_index, *delta.token_ids) for delta in deltas][0] == (0, 0)
    assert [token for delta in deltas for token in delta.token_ids] == [0, 1, 2, 3, 4]
    assert {delta.request_id for delta in deltas} == {"r"}
    (message,) = (message for message in second.received if isinstance(message, EngineRequest))
    assert (message.token_ids, message.emitted) == (tuple(range(10)), (0,))
    assert message.deadline_s is not None and message.deadline_s < TIMEOUT_S
    assert cluster.queries[1].num_tokens == 11 and cluster.queries[1].expected_output_tokens == 4
    assert cluster.queries[1].excluded == ("first",)
    # What later engines find cached is what earlier ones computed for this very request.
    assert {delta.num_cached_tokens for delta in deltas} == {4}
    assert cluster.metrics.value(REQUESTS_REPLAYED) == 1
    assert cluster.metrics.histogram(ROUTER_QUERY_S).count == 2


async def test_a_request_may_move_any_number_of_times(cluster: Cluster) -> None:
    """Each of them says its one token; an engine that drains is not one that was lost over the request."""
    draining = [await cluster.add(f"e{number}", say_one_token_and_drain) for number in range(MAX_PLACEMENTS + 2)]
    last = await cluster.add("last", count_up)
    cluster.order = [engine.endpoint.address for engine in (*draining, last)]
    assert await cluster.generate(max_tokens=10) == list(range(10))
    emitted = [engine.received for engine in (*draining, last)]
    requests = [message for received in emitted for message in received if isinstance(message, EngineRequest)]
    assert [len(message.emitted) for message in requests] == list(range(MAX_PLACEMENTS + 3))
    assert not any(isinstance(message, CancelRequest) for received in emitted for message in received)
    assert cluster.metrics.value(REQUESTS_REPLAYED) == MAX_PLACEMENTS + 2


async def test_a_prefill_engine_takes_over_when_the_only_decode_engine_is_lost(cluster: Cluster) -> None:
    decode = await cluster.add("decode", say_one_token, role="decode")
    prefill = await cluster.add("prefill", count_up, role="prefill")
    deltas = [delta async for delta in cut_after_first_token(cluster, "decode")]
    assert [token for delta in deltas for token in delta.token_ids] == [0, 1, 2, 3, 4]
    (first,) = [message for message in decode.received if isinstance(message, EngineRequest)]
    (second,) = [message for message in prefill.received if isinstance(message, EngineRequest)]
    assert first.prefill == prefill.endpoint.address
    assert (second.prefill, second.emitted) == (None, (0,))
    await cluster.client.check_ready()


async def cut_after_first_token(cluster: Cluster, peer_id: str, request_id: str = "r") -> AsyncIterator[TokenDelta]:
    """A request of five tokens whose engine is lost when the first has come."""
    async with aclosing(cluster.client.generate(request_of(request_id, 5))) as deltas:
        yield await deltas.__anext__()
        cluster.client.lose(peer_id)
        async for delta in deltas:
            yield delta


async def test_a_message_lost_on_the_way_is_made_up_for_and_the_engine_told_to_stop(cluster: Cluster) -> None:
    first, second = await cluster.add("first", skip_a_token), await cluster.add("second", count_up)
    cluster.order = [first.endpoint.address, second.endpoint.address]
    assert await cluster.generate() == [0, 1, 2, 3, 4]
    await eventually(lambda: CancelRequest("r") in first.received)


async def test_what_an_engine_says_that_was_given_up_reaches_nobody_and_is_stopped(cluster: Cluster) -> None:
    first, second = await cluster.add("first", say_one_token), await cluster.add("second", say_one_token)
    cluster.order = [first.endpoint.address, second.endpoint.address]
    deltas = cluster.client.generate(request_of("r", 5))
    await deltas.__anext__()
    cluster.client.lose("first")
    assert (await deltas.__anext__()).token_ids == (1,)
    (request,) = (message for message in first.received if isinstance(message, EngineRequest))
    # It was only slow: back on the network, it goes on where it was, which is where the second one is, too.
    say(first, "ingress", request, range(1, 3))
    await eventually(lambda: first.received[-1] == CancelRequest("r"))
    (again,) = (message for message in second.received if isinstance(message, EngineRequest))
    assert again.request_id != request.request_id
    say(second, "ingress", again, range(2, 5))
    rest = [token async for delta in deltas for token in delta.token_ids]
    assert rest == [2, 3, 4]


async def test_requests_wait_while_the_only_engine_is_replaced(cluster: Cluster) -> None:
    first = await cluster.add("first", say_one_token)
    begun = [asyncio.create_task(cluster.generate(f"begun{number}")) for number in range(8)]
    await eventually(lambda: len(first.received) == 8)
    await cluster.remove(first)
    new = [asyncio.create_task(cluster.generate(f"new{number}")) for number in range(3)]
    await asyncio.sleep(2 * AVOID_S)
    assert not any(task.done() for task in (*begun, *new))
    with pytest.raises(NotReady, match="3 wait for one already"):
        await cluster.generate("one too many")
    with pytest.raises(NotReady):
        await cluster.client.check_ready()
    await cluster.add("second", count_up)
    assert await asyncio.gather(*begun, *new) == [[0, 1, 2, 3, 4]] * 11
    assert not cluster.client.has_open_requests


async def test_a_request_that_waits_for_an_engine_ends_at_its_deadline(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await cluster.add("first", say_one_token)
    monkeypatch.setattr(cluster.client, "_config", with_request_timeout(cluster.client._config, 0.5))
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(first.received) == 1)
    await cluster.remove(first)
    with pytest.raises(RequestTimeout, match="no replica could take the request"):
        await running
    assert not cluster.client.has_open_requests


def with_request_timeout(config: ClusterConfig, seconds: float) -> ClusterConfig:
    return config.model_copy(update={"serving": config.serving.model_copy(update={"request_timeout_s": seconds})})


async def test_a_client_that_leaves_while_its_request_waits_leaves_nothing_behind(cluster: Cluster) -> None:
    first = await cluster.add("first", say_one_token)
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(first.received) == 1)
    await cluster.remove(first)
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.wait((running,), timeout=20.0)
    assert running.cancelled() and not cluster.client.has_open_requests
    second = await cluster.add("second", count_up)
    await asyncio.sleep(0.1)
    assert not any(isinstance(message, EngineRequest) for message in second.received)


async def test_an_engine_that_was_lost_by_mistake_is_used_again_after_a_while(cluster: Cluster) -> None:
    only = await cluster.add("only", count_up)
    lost_s = time.monotonic()
    cluster.client.lose("only")
    cluster.announce()
    running = asyncio.create_task(cluster.generate())
    await asyncio.sleep(AVOID_S / 2)
    assert only.received == [] or time.monotonic() > lost_s + AVOID_S
    await asyncio.sleep(AVOID_S / 2)
    cluster.announce()
    assert await running == [0, 1, 2, 3, 4]


async def test_an_engine_that_took_the_place_of_a_lost_one_is_used_at_once(cluster: Cluster) -> None:
    first = await cluster.add("engine", say_one_token)
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(first.received) == 1)
    cluster.engines.remove(first)
    await first.endpoint.close()
    second = Peer("engine", count_up, epoch=2)
    await second.endpoint.start()
    cluster.engines.append(second)
    await eventually(lambda: "engine" in cluster.client._lost)
    cluster.announce()
    assert await running == [0, 1, 2, 3, 4]


async def test_a_new_request_is_told_of_a_full_queue(cluster: Cluster) -> None:
    await cluster.add("full", say_an_error("Overloaded", 7.0))
    with pytest.raises(Overloaded) as caught:
        await cluster.generate()
    assert caught.value.retry_after_s == 7.0 and not isinstance(caught.value, NotReady)


async def test_a_request_that_lost_its_engine_waits_for_a_place_in_a_full_queue(cluster: Cluster) -> None:
    num_refused = 0

    def have_room_later(peer: Peer, source: str, message: Message) -> None:
        nonlocal num_refused
        if isinstance(message, EngineRequest) and num_refused < 2:
            num_refused += 1
            say_an_error("Overloaded", 0.1)(peer, source, message)
        else:
            count_up(peer, source, message)

    first = await cluster.add("first", say_one_token)
    cluster.order = [first.endpoint.address]
    await cluster.add("second", have_room_later)
    deltas = [delta async for delta in cut_after_first_token(cluster, "first")]
    assert [token for delta in deltas for token in delta.token_ids] == [0, 1, 2, 3, 4]
    assert num_refused == 2


async def test_losing_one_engine_after_the_other_is_an_error_that_says_so(cluster: Cluster) -> None:
    engines = [await cluster.add(f"engine{number}", say_one_token) for number in range(MAX_PLACEMENTS)]
    cluster.order = [engine.endpoint.address for engine in engines]
    deltas = cluster.client.generate(request_of("r", 50))
    for number, engine in enumerate(engines):
        assert (await deltas.__anext__()).token_ids == (number,)
        cluster.client.lose(engine.card().address.peer_id)
    with pytest.raises(RequestFailed, match="5 engines were lost"):
        await deltas.__anext__()
    assert not cluster.client.has_open_requests


async def test_engines_that_are_only_slow_may_be_given_up_any_number_of_times(cluster: Cluster) -> None:
    """As on a machine that has no processor time for a while: everybody is silent, and everybody is there again."""
    for name in ("first", "second", "third"):
        await cluster.add(name, say_one_token)

    async def announce_again_and_again() -> None:
        while True:
            cluster.announce()
            await asyncio.sleep(0.02)

    announcing = asyncio.create_task(announce_again_and_again())
    async with aclosing(cluster.client.generate(request_of("r", 50))) as deltas:
        for number in range(MAX_PLACEMENTS + 2):
            assert (await deltas.__anext__()).token_ids == (number,)
            (peer_id,) = cluster.client._requests_by_peer
            cluster.client.lose(peer_id)
    announcing.cancel()
    assert not cluster.client.has_open_requests


async def test_leaving_early_cancels_the_request_and_nothing_stays_behind(cluster: Cluster) -> None:
    engine = await cluster.add("first", say_one_token)
    cluster.order = [engine.endpoint.address]
    async with aclosing(cluster.client.generate(request_of("r", 5))) as deltas:
        await deltas.__anext__()
    await eventually(lambda: CancelRequest("r") in engine.received)
    assert not cluster.client.has_open_requests


async def test_a_request_that_is_cancelled_just_as_the_router_answers_reaches_no_engine(cluster: Cluster) -> None:
    cluster.router_answers = False
    engine = await cluster.add("first", ignore)
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(cluster.queries) == 1)
    decision = RouteDecision(query_id=cluster.queries[0].query_id, decode=engine.endpoint.address, reason="load")
    cluster.client.receive("router", decision)
    running.cancel()
    await asyncio.wait((running,), timeout=20.0)
    assert running.cancelled()
    assert not cluster.client.has_open_requests and engine.received == []
