"""The drill finds our listeners and no others, and its attacks do no harm to them."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from atom_cluster.kv_transfer import tcp_wire
from atom_cluster.kv_transfer.tcp_server import BlockServer
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import EngineStatus, StatusAnswer, StatusRequest
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.tools.drill import hostile, siege
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.listeners import Listener, listeners_of, num_descriptors, resident_bytes
from atom_cluster.tools.drill.watch import EngineWatch, num_held
from atom_cluster.units import MiB
from tests.kv_transfer.ranks import make_regions
from tests.link.test_endpoint import SECRET, Node, eventually

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a Linux /proc")


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    found = Node("node")
    await found.endpoint.start()
    yield found
    await found.endpoint.close()


@pytest.fixture
def server() -> Iterator[BlockServer]:
    made = BlockServer(
        host="127.0.0.1", key=tcp_wire.WireKey(SECRET), regions=make_regions(num_blocks=8, block_bytes=(64,), seed=1)
    )
    yield made
    made.check_alive()
    made.close()


def port_of(endpoint: Endpoint) -> int:
    return int(endpoint.address.endpoint.rpartition(":")[2])


async def test_our_listeners_are_found_and_no_others(node: Node, server: BlockServer) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        found = await asyncio.to_thread(listeners_of, [os.getpid()])
    own = {(port_of(node.endpoint), "link"), (server.port, "kv over tcp")}
    assert {(listener.port, listener.kind) for listener in found} == own
    assert {listener.host for listener in found} == {"127.0.0.1"}


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.__name__)
async def test_an_attack_does_no_harm(
    node: Node, server: BlockServer, attack: hostile.Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "NUM_SILENT", 30)
    monkeypatch.setattr(hostile, "HANDSHAKE_S", -0.9)
    num_before = num_descriptors(os.getpid())
    for listener in (
        Listener(os.getpid(), "127.0.0.1", port_of(node.endpoint), "link"),
        Listener(os.getpid(), "127.0.0.1", server.port, "kv over tcp"),
    ):
        assert await asyncio.to_thread(attack, listener, SECRET) >= 0
    assert all(message.request_id.startswith("nobody's") for _, message in node.received)  # type: ignore[union-attr]
    member = Node("member")
    await member.endpoint.start()
    member.endpoint.send(node.endpoint.address, CancelRequest("after"))
    await eventually(lambda: ("member", CancelRequest("after")) in node.received)
    await member.endpoint.close()
    await eventually(lambda: num_descriptors(os.getpid()) <= num_before)


async def test_a_process_that_listens_nowhere_is_an_error() -> None:
    with pytest.raises(DrillError, match="no listener of processes"):
        await asyncio.to_thread(siege.besiege, RunningCluster("http://127.0.0.1:1"), [os.getpid()], SECRET)


@pytest.mark.parametrize(("grown_mib", "num_sieges"), [([5], 1), ([90, 3], 2), ([90, 80, 10], 3), ([90, 80, 70], None)])
def test_only_memory_that_grows_every_time_is_kept_memory(
    grown_mib: list[int], num_sieges: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = iter([value * MiB for grown in grown_mib for value in (100, 100 + grown)])
    monkeypatch.setattr(siege, "listeners_of", lambda pids: [Listener(pid, "127.0.0.1", 1, "link") for pid in pids])
    monkeypatch.setattr(siege, "ATTACKS", (lambda listener, secret: 7,))
    monkeypatch.setattr(siege, "resident_bytes", lambda pid: next(memory))
    cluster = RunningCluster("http://127.0.0.1:1")
    if num_sieges is None:
        with pytest.raises(DrillError, match=r"grew every time, MiB: \[90, 80, 70\]"):
            siege.besiege(cluster, [os.getpid()], SECRET)
        return
    notes = siege.besiege(cluster, [os.getpid()], SECRET)
    assert (notes["num_sieges"], notes["num_attempts"]) == (num_sieges, 7 * num_sieges)
    assert notes["memory_mib"] == grown_mib[-1]


def test_lines_about_refusals_are_found_in_a_clusters_log() -> None:
    lines = (
        "(Worker pid=77) 2026 WARNING link.endpoint: refused connections: 251, the last from 10.0.0.1: 251 x x\n"
        "\x1b[36m(ServeReplica:atom:Ingress pid=78)\x1b[0m refused messages: 4: 4 x y\n"
        "(Worker pid=79) something else: 5\n"
    )
    assert siege._REFUSED.findall(lines) == [("77", "251"), ("78", "4")]


def test_memory_of_a_process_is_told() -> None:
    before = resident_bytes(os.getpid())
    # Not from the heap, which may have room that is resident already.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"x" * (64 << 20))
        assert resident_bytes(os.getpid()) - before > 32 << 20


async def test_a_watch_asks_engines_how_they_are_and_leaves_out_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom_cluster.tools.drill.watch._ANSWER_TIMEOUT_S", 0.5)
    status = EngineStatus(num_running=1, num_waiting=0, num_tickets=2, blocks_by_state={"free": 3, "leased": 4})
    engine, silent = Node("engine"), Node("silent")
    await engine.endpoint.start()
    await silent.endpoint.start()

    def answer(source: str, message: object) -> None:
        if isinstance(message, StatusRequest):
            engine.endpoint.send(source, StatusAnswer(epoch=1, status=status))

    monkeypatch.setattr(engine.endpoint, "_on_message", answer)
    watch = EngineWatch(secret=SECRET, host="127.0.0.1")
    addresses = [engine.endpoint.address, silent.endpoint.address]
    for _ in range(3):
        assert await asyncio.to_thread(watch.statuses, addresses) == {"engine": status}
    assert num_held(status) == 7
    await asyncio.to_thread(watch.close)
    await engine.endpoint.close()
    await silent.endpoint.close()


def test_the_secret_of_nobody_is_not_ours() -> None:
    assert ClusterKey.from_secret(hostile._SECRET_OF_NOBODY) != ClusterKey.from_secret(SECRET)
