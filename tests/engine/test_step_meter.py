"""Every metric that an engine records moves when what it counts happens."""

from __future__ import annotations

import msgspec
import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.scheduler import ScheduledRow, ScheduledStep
from atom_cluster.engine.step_meter import MAX_CHOICE_LENGTH, StepMeter, record_start
from atom_cluster.messages.start import StartFacts
from atom_cluster.messages.steps import StepResult
from atom_cluster.messages.transfer import KvPublication
from atom_cluster.observability import metrics as table
from atom_cluster.observability.memory import MemoryMetrics
from tests.engine.split import CLIENT, make_split
from tests.factories import TRANSFER, make_engine, make_message, make_prompt, make_request, make_runner, window
from tests.fakes import Network, VirtualClock


def test_steps_are_told_apart_by_what_is_in_them() -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    engine = make_engine(network, metrics=metrics, scheduler=SchedulerConfig(max_num_batched_tokens=16))
    engine.put("client", make_message("r0", make_prompt(20), 10))
    for _ in range(4):
        engine.step()
    engine.put("client", make_message("r1", make_prompt(20, 1), 4))
    network.settle()
    counts = {kind: metrics.histogram(table.STEP_S, kind=kind).count for kind in ("prefill", "decode", "mixed")}
    assert all(counts.values()), counts
    assert metrics.histogram(table.STEP_TOKENS).count == sum(counts.values())
    assert metrics.value(table.STEPS, execution="simulated") == sum(counts.values())
    assert metrics.histogram(table.STEP_TOKENS, kind="prefill").sum >= 16


def test_the_device_waits_for_the_host_from_when_a_step_could_have_begun() -> None:
    clock, metrics = VirtualClock(), MemoryMetrics()
    meter = StepMeter(metrics, clock)
    rows = [ScheduledRow(make_request(0), 1, 1, samples=True)]
    clock.sleep(5.0)  # idle: nothing could have begun
    meter.submitted(ScheduledStep())
    meter.submitted(ScheduledStep())
    clock.sleep(1.0)
    meter.collected(rows, StepResult(step_id=0, run_s=0.75))
    assert metrics.value(table.DEVICE_WAIT_S) == pytest.approx(0.25)
    clock.sleep(0.5)
    meter.collected(rows, StepResult(step_id=1, run_s=0.5, execution="graph"))
    assert metrics.value(table.DEVICE_WAIT_S) == pytest.approx(0.25), (
        "it had been submitted before the one before ended"
    )
    assert metrics.value(table.STEPS, execution="graph") == 1


def test_steps_that_waited_for_kernels_are_counted_told_and_not_taken_for_slow_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, metrics = VirtualClock(), MemoryMetrics()
    meter = StepMeter(metrics, clock)
    rows = [ScheduledRow(make_request(0), 1, 1, samples=True)]
    for compiled in ((("a.kernel", 0.02),), (("b.kernel", 1.5), ("a.kernel", 0.5)), ()):
        meter.submitted(ScheduledStep())
        meter.collected(rows, StepResult(step_id=0, compiled=compiled))
    assert metrics.value(table.KERNELS_COMPILED) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "a step with 1 rows waited 2.0 s for kernels: a.kernel, b.kernel"
    ]


def test_what_a_compiling_step_took_says_nothing_of_later_ones() -> None:
    network = Network(VirtualClock())
    runner = make_runner(network.clock)
    engine = make_engine(network, runner=runner)
    collect = runner.collect

    def collect_compiled(timeout_s: float | None = None) -> StepResult | None:
        result = collect(timeout_s)
        return None if result is None else msgspec.structs.replace(result, run_s=9.0, compiled=(("a.kernel", 9.0),))

    runner.collect = collect_compiled  # type: ignore[method-assign]
    engine.put("client", make_message("r0", make_prompt(20), 5))
    network.settle()
    assert engine._speed.decode_step_s == 0.0
    assert not engine._speed.speed(has_decoding=False).prompt_s


def test_who_waits_is_counted_by_why() -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    runner = make_runner(network.clock, num_rows=1)
    engine = make_engine(network, runner=runner, metrics=metrics)
    for number in range(3):
        engine.put("client", make_message(f"r{number}", make_prompt(8, number), 20))
    for _ in range(4):
        engine.step()
    assert metrics.value(table.REQUESTS_WAITING, reason="new") == 2
    reasons = {"new", "preempted", "kv_arrived", "kv_room", "grammar"}
    assert metrics.series(table.REQUESTS_WAITING).keys() == {(reason,) for reason in reasons}
    network.settle()
    network.clock.sleep(1.0)
    engine.step()
    assert metrics.value(table.REQUESTS_WAITING) == 0


@pytest.mark.parametrize("num_blocks", [8, 13])
def test_preemptions_have_causes_and_prefixes_that_were_evicted_are_counted(num_blocks: int) -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    engine = make_engine(network, runner=make_runner(network.clock, num_blocks=num_blocks), metrics=metrics)
    for number in range(3):
        engine.put("client", make_message(f"r{number}", make_prompt(8, number), 20))
    network.settle()
    causes = metrics.series(table.PREEMPTIONS)
    assert causes and {cause for (cause,) in causes} <= {"other_grows", "own_growth", "admission"}
    network.clock.sleep(1.0)
    engine.step()
    assert metrics.value(table.PREFIX_CACHE_BLOCKS) > 0
    assert metrics.value(table.PREFIX_CACHE_EVICTIONS) > 0


def test_reads_are_counted_by_transport_and_outcome_and_tickets_by_state() -> None:
    split = make_split(kv_bytes_per_s=1e8)
    split.send()
    split.turns_until(split.has_carried(KvPublication))
    seen: set[str] = set()
    for _ in range(40):
        split.network.turn()
        for sink in (split.metrics, split.prefill_metrics):
            seen |= {state for (state,), count in sink.series(table.TICKETS_OPEN).items() if count}
    assert split.metrics.value(table.KV_READS, transport="sim", outcome="ok") > 0
    assert split.metrics.value(table.KV_TRANSFER_BYTES, transport="sim") > 0
    assert split.metrics.histogram(table.KV_TRANSFER_S, transport="sim").count > 0
    assert {"published", "receiving"} <= seen
    assert split.metrics.value(table.TICKETS_OPEN) == 0


def test_what_goes_wrong_between_engines_is_counted_and_told() -> None:
    split = make_split(kv_bytes_per_s=1e5)
    split.send()
    split.network.settle()
    assert split.metrics.value(table.KV_READS, transport="sim", outcome="failed") > 0
    assert split.metrics.histogram(table.KV_TRANSFER_S).count == 0
    (note,) = split.decode.stats().recent_errors
    assert note.kind == "TransferError" and "read_failed" in note.message


def test_a_lease_that_runs_out_is_counted_by_prefill() -> None:
    split = make_split(kv_bytes_per_s=1e3)
    split.send()
    split.turns_until(split.has_carried(KvPublication))
    split.network.remove("decode")
    split.network.clock.sleep(TRANSFER.lease_s)
    split.network.turn()
    assert split.prefill_metrics.value(table.KV_LEASE_EXPIRIES) == 1


def test_errors_are_counted_by_kind_and_those_of_clients_are_not_kept() -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    engine = make_engine(network, metrics=metrics, scheduler=SchedulerConfig(max_waiting_requests=1))
    engine.put("client", make_message("too_long", make_prompt(4000), 4))
    for number in range(3):
        engine.put("client", make_message(f"r{number}", make_prompt(8, number), 4))
    engine.step()
    assert metrics.value(table.REQUEST_ERRORS, kind="Overloaded") == 2
    assert metrics.value(table.REQUEST_ERRORS) == 3
    (note,) = engine.stats().recent_errors
    assert (note.kind, note.count) == ("Overloaded", 2)
    assert CLIENT not in note.message


def test_how_many_tokens_a_step_with_drafts_brings_is_a_histogram() -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    engine = make_engine(network, runner=make_runner(network.clock, max_drafts=3), metrics=metrics)
    engine.put("client", make_message("r", make_prompt(8), 24))
    network.settle()
    found = metrics.histogram(table.SPEC_ACCEPTED_LENGTH)
    assert found.count > 0
    assert found.sum == found.count + metrics.value(table.SPEC_ACCEPTED_TOKENS)


def test_facts_of_the_start_are_gauges() -> None:
    metrics = MemoryMetrics()
    start = StartFacts(weight_bytes=7, kv_bytes=5, num_graphs=3, num_pieces=2, capture_s=1.5, parts_s={"load": 4.0})
    record_start(start, {"ops": "torch: " + "x" * 1000}, metrics)
    assert (metrics.value(table.MEMORY_BYTES, use="weights"), metrics.value(table.MEMORY_BYTES, use="kv")) == (7, 5)
    assert metrics.value(table.GRAPHS_CAPTURED, kind="graph") == 3
    assert metrics.value(table.GRAPHS_CAPTURED, kind="pieces") == 2
    assert metrics.value(table.GRAPH_CAPTURE_S) == 1.5
    assert metrics.value(table.START_S, part="load") == 4.0
    ((choice, value),) = metrics.series(table.CHOICE_INFO)
    assert choice == "ops" and value.startswith("torch") and len(value) == MAX_CHOICE_LENGTH


def test_what_a_request_waits_for_and_how_long_it_takes_is_recorded() -> None:
    metrics, network = MemoryMetrics(), Network(VirtualClock())
    runner = make_runner(network.clock, num_rows=1, other_groups=(window(4),))
    engine = make_engine(network, runner=runner, metrics=metrics)
    for number in range(2):
        engine.put("client", make_message(f"r{number}", make_prompt(20, number), 10))
    engine.step()
    assert metrics.value(table.WAITING_TOKENS) > 20
    network.settle()
    waited, took = metrics.histogram(table.QUEUE_S), metrics.histogram(table.E2E_S)
    assert waited.count == took.count == 2 and 0 < waited.sum < took.sum
    assert {group for group, _ in metrics.series(table.KV_PAGES)} == {"window 4"}
