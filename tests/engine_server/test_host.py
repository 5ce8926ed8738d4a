"""An engine host answers over real sockets, outlives its clients, says when its engine failed and leaves no trace."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from atom_cluster.config.observability import ProfileConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.engine_server.host import EngineHost
from atom_cluster.errors import AtomClusterError
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    ReplicaLoad,
    SnapshotRequest,
    StatusAnswer,
    StatusRequest,
)
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from atom_cluster.messages.requests import CancelRequest, SamplingParams
from atom_cluster.messages.steps import StepResult
from atom_cluster.messages.transfer import KvPlacement, PrefillFailed, PrefillOrder
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import REQUESTS_FINISHED
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from tests.engine_server.conftest import Client, Stage, eventually, make_settings, make_slow_runner
from tests.factories import expected_tokens, make_message, make_prompt
from tests.fakes import Answer, FailingRunner, RecordingRunner
from tests.tiny_models import tiny_model_dir


def order(ticket_id: str = "t") -> PrefillOrder:
    return PrefillOrder(
        ticket_id=ticket_id,
        request_id="r",
        token_ids=make_prompt(10),
        sampling=SamplingParams(seed=0, max_tokens=5),
        eos_token_ids=(),
        num_tokens_held=0,
        lease_s=10.0,
        fingerprint="f",
        fingerprint_fields={},
        placement=KvPlacement(4, 1),
    )


async def test_requests_of_several_clients_are_answered(stage: Stage) -> None:
    engine, clients = await stage.host(), [await stage.client(f"ingress{number}") for number in range(3)]
    for number in range(30):
        message = make_message(f"r{number}", make_prompt(10 + number, seed=number), 5 + number % 7)
        clients[number % 3].endpoint.send(engine.card.address, message)
    for number in range(30):
        answer = await clients[number % 3].finished(f"r{number}")
        assert answer.reason == "length"
        assert answer.tokens == expected_tokens(make_prompt(10 + number, seed=number), 5 + number % 7)
    await engine.idle()


async def test_its_card_says_what_the_router_needs(stage: Stage) -> None:
    engine = await stage.host(settings=make_settings("decode-1", "decode"))
    card = engine.card
    assert (card.address.peer_id, card.kind, card.role, card.pid) == ("decode-1", "engine", "decode", os.getpid())
    assert (card.num_blocks, card.block_size) == (engine.runner.info.num_blocks, engine.runner.info.block_size)
    assert card.fingerprint and "runner" in card.choices


async def test_a_cancelled_request_ends_without_another_word(stage: Stage) -> None:
    engine, client = await stage.host(make_slow_runner(0.01)), await stage.client()
    client.endpoint.send(engine.card.address, make_message(max_tokens=2000))
    await eventually(lambda: client.num_tokens("r") > 0)
    client.endpoint.send("engine", CancelRequest("r"))
    await engine.idle()
    assert engine.metrics.value(REQUESTS_FINISHED, reason="abort") == 1
    client.endpoint.send("engine", make_message("next"))
    assert (await client.finished("next")).reason == "length"
    assert client.answers["r"].final is None


async def test_another_client_cannot_cancel_it(stage: Stage) -> None:
    engine, owner, other = await stage.host(make_slow_runner(0.005)), await stage.client(), await stage.client("other")
    owner.endpoint.send(engine.card.address, make_message(max_tokens=40))
    await eventually(lambda: owner.num_tokens("r") > 0)
    other.endpoint.send(engine.card.address, CancelRequest("r"))
    assert (await owner.finished("r")).reason == "length"


async def test_requests_of_a_client_that_vanished_end(stage: Stage) -> None:
    engine = await stage.host(make_slow_runner(0.01), make_settings(client_timeout_s=1.0))
    client, survivor = await stage.client(), await stage.client("survivor")
    for number in range(12):  # four of them wait: the runner has eight rows
        client.endpoint.send(engine.card.address, make_message(f"r{number}", max_tokens=4000))
    await eventually(lambda: client.num_tokens("r0") > 0 and engine.host.status().num_waiting == 4)
    assert not engine.host.is_idle()
    stage.clients.remove(client)
    await client.endpoint.close()
    await engine.idle()
    survivor.endpoint.send(engine.card.address, make_message("next"))
    assert (await survivor.finished("next")).reason == "length"


async def test_whoever_asks_for_a_snapshot_gets_events_and_load_from_then_on(stage: Stage) -> None:
    engine, router, client = await stage.host(), await stage.client("router"), await stage.client()
    client.endpoint.send(engine.card.address, make_message("before", 20))
    await client.finished("before")
    router.endpoint.send(engine.card.address, SnapshotRequest(engine.card.address.epoch))
    await eventually(lambda: any(isinstance(message, ReplicaLoad) for message in router.received))
    client.endpoint.send("engine", make_message("after", make_prompt(20, seed=7)))
    await client.finished("after")
    await eventually(lambda: any(isinstance(message, CacheEvents) for message in router.received))
    first, *rest = [message for message in router.received if not isinstance(message, ReplicaLoad)]
    assert isinstance(first, CacheSnapshot) and len(first.hashes) >= 5  # blocks of four tokens
    assert isinstance(rest[0], CacheEvents) and rest[0].first_seq == first.next_seq
    assert len(rest[0].stored) >= 1 and not set(rest[0].stored) & set(first.hashes)
    assert {message.epoch for message in (first, rest[0])} == {engine.card.address.epoch}
    assert not any(isinstance(message, (CacheEvents, CacheSnapshot, ReplicaLoad)) for message in client.received)


async def test_its_status_is_told_whoever_asks_while_a_step_runs(stage: Stage) -> None:
    runner, may_end = make_slow_runner(), threading.Event()
    collect = runner.collect

    def collect_late(timeout_s: float | None = None) -> StepResult | None:
        return collect(timeout_s) if may_end.wait(timeout_s) else None

    runner.collect = collect_late  # type: ignore[method-assign]
    engine, client = await stage.host(runner), await stage.client()
    client.endpoint.send(engine.card.address, make_message("slow", max_tokens=3))
    await eventually(lambda: engine.host.status().num_running == 1)
    client.endpoint.send("engine", StatusRequest())
    await eventually(lambda: any(isinstance(message, StatusAnswer) for message in client.received))
    (answer,) = [message for message in client.received if isinstance(message, StatusAnswer)]
    assert answer.epoch == engine.card.address.epoch
    assert answer.status.num_running == 1 and answer.status.num_mismatches == 0
    may_end.set()
    await client.finished("slow")


async def test_a_draining_host_moves_what_it_cannot_finish_and_is_idle_in_time(stage: Stage) -> None:
    engine, other, client = await stage.host(make_slow_runner(0.005)), await stage.host(), await stage.client()
    client.endpoint.send(engine.card.address, make_message("r", max_tokens=2000))
    await eventually(lambda: client.num_tokens("r") > 0)
    began_s = time.monotonic()
    engine.host.begin_drain(0.1)
    moved = await client.finished("r")
    await engine.idle()
    assert 0.1 <= time.monotonic() - began_s < 5.0
    assert moved.error_kind == "NotReady" and 0 < len(moved.tokens) < 2000
    message = msgspec.structs.replace(make_message("r+", max_tokens=len(moved.tokens) + 5), emitted=tuple(moved.tokens))
    client.answers["r+"] = Answer(tokens=list(moved.tokens))
    client.endpoint.send(other.card.address, message)
    answer = await client.finished("r+")
    assert answer.tokens == expected_tokens(make_prompt(10), len(moved.tokens) + 5)


async def test_a_draining_host_refuses_what_is_new_and_finishes_what_it_has(stage: Stage) -> None:
    engine, client = await stage.host(make_slow_runner(0.005)), await stage.client()
    client.endpoint.send(engine.card.address, make_message("old", max_tokens=50))
    await eventually(lambda: client.num_tokens("old") > 0)
    engine.host.begin_drain(5.0)
    client.endpoint.send("engine", make_message("new"))
    client.endpoint.send("engine", order())
    refused = await client.finished("new")
    assert refused.error_kind == "NotReady" and refused.tokens == []
    await eventually(lambda: any(isinstance(message, PrefillFailed) for message in client.received))
    (failed,) = [message for message in client.received if isinstance(message, PrefillFailed)]
    assert (failed.ticket_id, failed.kind) == ("t", "NotReady")
    assert (await client.finished("old")).tokens == expected_tokens(make_prompt(10), 50)
    await engine.idle()


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_host_with_a_request_is_never_taken_for_idle(stage: Stage, is_async: bool) -> None:
    settings = make_settings(scheduler=SchedulerConfig(async_scheduling=is_async))
    runner = RecordingRunner(make_slow_runner(0.2))
    engine, client = await stage.host(runner, settings), await stage.client()
    client.endpoint.send(engine.card.address, make_message(max_tokens=3))
    await eventually(lambda: bool(runner.plans))
    while client.num_tokens("r") < 2:  # the last token leaves the engine before it arrives here
        assert not engine.host.is_idle()
        await asyncio.sleep(0.001)
    await engine.idle()


async def test_when_the_runner_fails_everybody_is_told(stage: Stage) -> None:
    engine = await stage.host(FailingRunner(make_slow_runner(0.005), fails_at=5))
    client = await stage.client()
    assert engine.host.failure() is None
    client.endpoint.send(engine.card.address, make_message("running", max_tokens=100))
    answer = await client.finished("running")
    assert answer.error_kind == "EngineLost" and 0 < len(answer.tokens) < 10
    assert answer.final is not None and answer.final.error is not None
    assert "the device is gone" in answer.final.error.message
    await eventually(lambda: engine.host.failure() is not None)
    assert engine.host.failure() == "RuntimeError: the device is gone"
    client.endpoint.send("engine", make_message("late"))
    client.endpoint.send("engine", order())
    assert (await client.finished("late")).error_kind == "NotReady"
    await eventually(lambda: any(isinstance(message, PrefillFailed) for message in client.received))


async def test_messages_that_are_not_for_engines_are_dropped_and_do_not_fill_the_log(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    engine, client = await stage.host(), await stage.client()
    for _ in range(200):
        client.endpoint.send(engine.card.address, CacheSnapshot(peer_id="x", epoch=1, next_seq=0, hashes=()))
    client.endpoint.send("engine", make_message())
    assert (await client.finished("r")).reason == "length"
    lines = [record for record in caplog.records if "unexpected CacheSnapshot" in record.getMessage()]
    assert len(lines) == 1


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def start_and_close() -> EngineHost:
    host = EngineHost(runner=make_slow_runner(), settings=make_settings(), metrics=MemoryMetrics())
    host.start()
    host.close()
    return host


def test_closing_twice_is_once_and_leaves_neither_thread_nor_descriptor() -> None:
    start_and_close()  # libraries open what they keep
    num_before, threads_before = num_descriptors(), set(threading.enumerate())
    host = start_and_close()
    host.close()
    assert set(threading.enumerate()) == threads_before
    assert num_descriptors() == num_before


def test_a_host_that_could_not_start_or_was_not_started_can_be_closed() -> None:
    start_and_close()
    num_before, threads_before = num_descriptors(), set(threading.enumerate())
    for is_started in (True, False):
        runner = make_slow_runner()
        host = EngineHost(runner=runner, settings=make_settings(secret=b"short"), metrics=MemoryMetrics())
        if is_started:
            with pytest.raises(ValueError, match="secret"):
                host.start()
        host.close()
        with pytest.raises(AtomClusterError, match="closed"):
            runner.poll_kv()
    assert set(threading.enumerate()) == threads_before
    assert num_descriptors() == num_before


async def test_a_profiler_window_is_asked_for_like_a_request_and_answered_with_its_traces(
    stage: Stage, tmp_path: Path
) -> None:
    options = RunnerOptions(
        model_dir=str(tiny_model_dir("llama")),
        device="cpu",
        num_blocks=64,
        num_threads=1,
        profile=ProfileConfig(directory=str(tmp_path)),
    )
    runner = await asyncio.to_thread(lambda: LocalRunner(build_model_runner(options)))
    engine, client = await stage.host(runner), await stage.client("ingress")
    client.endpoint.send(engine.card.address, StopProfile(call_id=1))
    await eventually(lambda: _answer(client, 1) is not None)
    client.endpoint.send(engine.card.address, StartProfile(call_id=2))
    client.endpoint.send(engine.card.address, make_message("r", (5, 6, 7), max_tokens=4))
    await client.finished("r")
    client.endpoint.send(engine.card.address, StopProfile(call_id=3))
    await eventually(lambda: _answer(client, 3) is not None, timeout_s=60)
    assert _answer(client, 1) == ProfileAnswer(call_id=1, error="no window is open: start one first")
    assert _answer(client, 2) == ProfileAnswer(call_id=2)
    answer = _answer(client, 3)
    assert answer is not None and answer.error is None
    assert [Path(file).parent for file in answer.files] == [tmp_path]
    assert Path(answer.files[0]).name.startswith("engine_rank0_")


async def test_an_engine_that_failed_refuses_windows(stage: Stage) -> None:
    engine = await stage.host(FailingRunner(make_slow_runner(0.005), fails_at=1))
    client = await stage.client("ingress")
    client.endpoint.send(engine.card.address, make_message("r", make_prompt(10), max_tokens=50))
    await eventually(lambda: engine.host.failure() is not None)
    client.endpoint.send(engine.card.address, StopProfile(call_id=1))
    await eventually(lambda: _answer(client, 1) is not None)
    answer = _answer(client, 1)
    assert answer is not None and (answer.error or "").startswith("the engine failed")


def _answer(client: Client, call_id: int) -> ProfileAnswer | None:
    answers = [message for message in client.received if isinstance(message, ProfileAnswer)]
    return next((answer for answer in answers if answer.call_id == call_id), None)
