"""Spans of a request follow each other without a gap, are few, and say what happened when."""

from __future__ import annotations

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.marks import MAX_SPANS, Marks
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.messages.requests import CancelRequest, TokenBatch, TokenDelta
from atom_cluster.messages.timing import EngineSpan, RequestTiming, SpanName
from atom_cluster.messages.transfer import KvPublication, PrefillOrder
from atom_cluster.observability.metrics import PREEMPTIONS
from tests.engine.split import CLIENT, Split, make_split
from tests.engine.test_core import Single
from tests.factories import assert_clean, expected_tokens, make_engine, make_message, make_prompt, make_runner
from tests.fakes import InterruptedRunner, Network, VirtualClock

STEP_S = 0.005


def names(timing: RequestTiming) -> list[SpanName]:
    return [span.name for span in timing.spans if span.seconds > 0]


def final_timing(final: TokenDelta | None) -> RequestTiming:
    assert final is not None and final.timing is not None
    return final.timing


def test_spans_end_where_the_next_ones_begin() -> None:
    marks = Marks(1.0)
    marks.begin("prefill", 3.0)
    marks.begin("prefill", 4.0)
    marks.num_steps += 2
    marks.begin("first_decode", 6.0)
    marks.note_read(0.5, 10)
    marks.note_read(0.25, 10)
    assert marks.timing(6.5) == RequestTiming(
        spans=(EngineSpan("queue", 2.0), EngineSpan("prefill", 3.0, 2), EngineSpan("first_decode", 0.5)),
        kv_read_s=0.75,
        kv_read_bytes=20,
    )


def test_another_engines_spans_stand_between_the_ways_to_it_and_back() -> None:
    marks = Marks(0.0)
    marks.begin("remote_prefill", 1.0)
    marks.split((EngineSpan("queue", 2.0), EngineSpan("prefill", 3.0, 4)), arrived_s=7.0, now_s=7.5)
    timing = marks.timing(8.0)
    assert timing.spans == (
        EngineSpan("queue", 1.0),
        EngineSpan("wire", 0.5),
        EngineSpan("queue", 2.0, 0, True),
        EngineSpan("prefill", 3.0, 4, True),
        EngineSpan("wire", 0.5),
        EngineSpan("step_wait", 0.5),
        EngineSpan("kv_transfer", 0.5),
    )
    assert timing.total_s == 8.0


def test_a_request_that_is_preempted_without_end_has_few_spans_that_still_add_up() -> None:
    marks = Marks(0.0)
    for number in range(1, 1000):
        marks.begin("prefill" if number % 2 else "queue", float(number))
    timing = marks.timing(1000.0)
    assert len(timing.spans) == MAX_SPANS and timing.spans[-1].name == "more"
    assert timing.total_s == 1000.0


def test_an_answer_has_the_times_of_its_steps() -> None:
    single = Single(SchedulerConfig(max_num_batched_tokens=8, async_scheduling=False))
    arrived_s = single.network.clock.at_s
    answer = single.ask(make_message("r", 20, 5))
    timing = final_timing(answer.final)
    assert names(timing) == ["prefill", "first_decode", "decode"]
    assert [span.num_steps for span in timing.spans if span.seconds > 0] == [3, 1, 3]
    assert timing.total_s == pytest.approx(single.network.clock.at_s - arrived_s)
    assert timing.seconds_in("decode") >= 3 * STEP_S


def test_the_first_token_says_how_long_it_took_and_the_others_say_nothing() -> None:
    single = Single()
    sent: list[TokenDelta] = []
    post = single.network.post

    def keep(source: str, destination: object, message: EngineOutput) -> None:
        sent.extend(message.deltas if isinstance(message, TokenBatch) else ())
        post(source, destination, message)  # type: ignore[arg-type]

    single.network.post = keep  # type: ignore[method-assign]
    single.ask(make_message("r", 10, 6))
    assert [delta.timing is not None for delta in sent] == [True, False, False, False, False, True]
    first, last = final_timing(sent[0]), final_timing(sent[-1])
    assert last.spans[: len(first.spans) - 1] == first.spans[:-1]


def test_waiting_for_a_row_and_waiting_after_a_preemption_are_both_waiting() -> None:
    single = Single(num_rows=1)
    single.send(make_message("first", 10, 10))
    single.send(make_message("second", make_prompt(10, 1), 10))
    single.finish()
    assert names(final_timing(single.answer("second").final))[:2] == ["queue", "prefill"]

    crowded = Single(num_blocks=13)
    for number in range(6):
        crowded.send(make_message(f"r{number}", make_prompt(10, number), 12))
    crowded.finish()
    assert crowded.metrics.value(PREEMPTIONS) > 0
    timings = [final_timing(crowded.answer(f"r{number}").final) for number in range(6)]
    assert any("queue" in names(timing)[2:] for timing in timings)
    for timing in timings:
        assert names(timing)[-1] == "decode"


def test_what_is_in_flight_when_a_request_is_preempted_does_not_end_its_waiting() -> None:
    """Every engine time in the answer is accounted for, preempted or not."""
    crowded = Single(num_blocks=13)
    began_s = crowded.network.clock.at_s
    for number in range(6):
        crowded.send(make_message(f"r{number}", make_prompt(10, number), 12))
    ends: dict[str, float] = {}
    while len(ends) < 6:
        crowded.network.turn()
        for number in range(6):
            if crowded.answer(f"r{number}").final is not None:
                ends.setdefault(f"r{number}", crowded.network.clock.at_s)
    for request_id, end_s in ends.items():
        total_s = final_timing(crowded.answer(request_id).final).total_s
        assert total_s <= end_s - began_s + 1e-9


def test_a_message_that_waits_for_the_step_under_way_waits_in_the_queue() -> None:
    single = Single(SchedulerConfig(async_scheduling=False))
    single.send(make_message("first", 10, 3))
    single.engine.step()
    single.send(make_message("second", make_prompt(10, 1), 3))
    single.network.clock.sleep(1.0)  # the engine is busy for so long
    single.finish()
    assert final_timing(single.answer("second").final).seconds_in("queue") >= 1.0


# --- two engines


def ask(split: Split, num_tokens: int = 30) -> RequestTiming:
    split.send("r", num_tokens, 6)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    return final_timing(split.answer().final)


def test_a_prompt_that_prefill_computed_has_its_times_from_both_engines() -> None:
    split = make_split(kv_bytes_per_s=2e7)  # a block takes longer than a step
    began_s = split.network.clock.at_s
    timing = ask(split)
    on_prefill = [span for span in timing.spans if span.is_on_prefill]
    assert [span.name for span in on_prefill] == ["queue", "prefill", "publish"]
    assert on_prefill[1].num_steps == 4  # 30 tokens in chunks of 8
    assert names(timing)[-3:] == ["kv_transfer", "first_decode", "decode"]
    assert timing.kv_read_bytes > 0
    # Reads began while prefill computed: what the request waited for is less than what they took.
    assert 0 < timing.seconds_in("kv_transfer") < timing.kv_read_s
    assert timing.total_s <= split.network.clock.at_s - began_s + 1e-9
    assert all(span.seconds >= -1e-9 for span in timing.spans)


def test_a_prompt_that_prefill_gave_up_is_computed_and_timed_on_decode() -> None:
    split = make_split()

    def lose(source: str, target: str, message: EngineOutput) -> EngineOutput | None:
        return None if isinstance(message, KvPublication) else message

    split.network.alter = lose
    timing = ask(split)
    assert [name for name in names(timing) if name != "queue"] == [
        "remote_prefill",
        "prefill",
        "first_decode",
        "decode",
    ]
    assert not any(span.is_on_prefill for span in timing.spans)
    assert timing.seconds_in("remote_prefill") >= split.transfer.prefill_timeout_s - 1e-6


@pytest.mark.parametrize("end", ["drain", "deadline"])
def test_requests_that_end_otherwise_say_where_their_time_went(end: str) -> None:
    single = Single(SchedulerConfig(async_scheduling=False))
    single.send(make_message("r", 10, 60, deadline_s=0.05 if end == "deadline" else None))
    for _ in range(3):
        single.engine.step()
    if end == "drain":
        single.engine.begin_drain(0.0)
    single.finish()
    final = single.answer().final
    assert final is not None and final.error is not None
    assert names(final_timing(final))[-1] == "decode"


def test_a_cancelled_request_says_nothing() -> None:
    single = Single()
    single.send(make_message("r", 10, 60))
    single.engine.step()
    single.engine.put(CLIENT, CancelRequest("r"))
    single.finish()
    assert single.answer().final is None


def test_the_first_token_from_prefill_does_not_wait_for_decodes_step() -> None:
    """Decode is busy with another request; what it knows of this one leaves before its step is waited for."""
    split = make_split()
    told: list[float] = []
    post = split.network.post
    arrived_s = 0.0

    def keep(source: str, destination: object, message: EngineOutput) -> None:
        now_s = split.network.clock.at_s
        deltas = message.deltas if isinstance(message, TokenBatch) else ()
        firsts = [delta for delta in deltas if delta.request_id == "r" and not delta.finish_reason and delta.timing]
        told.extend(now_s - arrived_s - final_timing(delta).total_s for delta in firsts)
        post(source, destination, message)  # type: ignore[arg-type]

    split.network.post = keep  # type: ignore[method-assign]
    split.decode.put(CLIENT, make_message("busy", make_prompt(5, 9), 60))
    for _ in range(5):
        split.network.turn()
    arrived_s = split.network.clock.at_s
    split.send("r", 30, 6)
    split.network.settle()
    assert told == [pytest.approx(0.0)]


@pytest.mark.parametrize("is_async", [True, False])
def test_the_first_token_from_prefill_does_not_wait_for_a_step_that_runs_when_it_comes(is_async: bool) -> None:
    network = Network(VirtualClock())
    is_in_step = False
    was_in_step: list[bool] = []
    post = network.post

    def let_prefill_work() -> None:
        nonlocal is_in_step
        network.deliver()
        network.step("prefill")
        network.deliver()
        is_in_step = True

    def keep(source: str, destination: object, message: EngineOutput) -> None:
        deltas = message.deltas if isinstance(message, TokenBatch) else ()
        was_in_step.extend(is_in_step for delta in deltas if delta.request_id == "r" and not delta.first_index)
        post(source, destination, message)  # type: ignore[arg-type]

    network.post = keep  # type: ignore[method-assign]
    make_engine(network, "prefill", runner=make_runner(network.clock))
    runner = InterruptedRunner(make_runner(network.clock), during_step=let_prefill_work)
    decode = make_engine(network, "decode", runner=runner, scheduler=SchedulerConfig(async_scheduling=is_async))
    decode.put(CLIENT, make_message("busy", make_prompt(5, 9), 60))
    decode.step()
    decode.put(CLIENT, make_message("r", 30, 6, prefill=network.addresses["prefill"]))
    while not was_in_step:
        is_in_step = False
        decode.step()
    assert was_in_step == [True]
    network.settle()
    assert network.answers["r"].tokens == expected_tokens(make_prompt(30), 6)
    assert network.answers["busy"].tokens == expected_tokens(make_prompt(5, 9), 60)
    for engine in network.engines.values():
        assert_clean(engine)


def test_a_prompt_for_prefill_does_not_wait_for_a_step_that_runs_when_it_comes() -> None:
    network = Network(VirtualClock())
    make_engine(network, "prefill", runner=make_runner(network.clock))
    runner = InterruptedRunner(make_runner(network.clock), during_step=lambda: None)
    decode = make_engine(network, "decode", runner=runner)
    decode.put(CLIENT, make_message("first", make_prompt(30, 3), 2, prefill=network.addresses["prefill"]))
    network.settle()
    decode.put(CLIENT, make_message("busy", make_prompt(5, 9), 60))
    decode.step()
    message = make_message("late", 30, 6, prefill=network.addresses["prefill"])
    num_orders: list[int] = []

    def look() -> None:
        if not num_orders:
            decode.put(CLIENT, message)
        network.deliver()
        num_orders.append(len(network.messages(PrefillOrder)))

    runner.during_step = look
    decode.step()
    assert num_orders[:2] == [1, 2]
    network.settle()
    assert network.answers["late"].tokens == expected_tokens(make_prompt(30), 6)
    for engine in network.engines.values():
        assert_clean(engine)
