"""A timeline's spans cover a request's time once, whatever engines said and did not say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.messages.timing import EngineSpan, RequestTiming
from atom_cluster.observability.timeline import (
    MAX_ATTEMPTS,
    MAX_OUTPUTS,
    AttemptRecord,
    OutputRecord,
    RequestRecord,
    TimelineOutput,
    compose,
)
from atom_cluster.observability.timeline_store import TimelineStore

FIRST = RequestTiming(spans=(EngineSpan("queue", 1.0), EngineSpan("prefill", 2.0, 3)))
WHOLE = RequestTiming(spans=(*FIRST.spans, EngineSpan("first_decode", 0.5, 1), EngineSpan("decode", 4.5, 9)))


def attempt_at(began_s: float, *, engine: str = "decode-1", prefill: str = "") -> AttemptRecord:
    attempt = AttemptRecord(began_s, engine=engine, prefill=prefill, reason="load", sent_s=began_s + 0.5)
    attempt.note("route", began_s + 0.5)
    return attempt


def record_of(*attempts: AttemptRecord, ended_s: float = 20.0) -> RequestRecord:
    """A request that arrived at 0, whose body was there at 1."""
    record = RequestRecord(
        arrived_s=0.0, created=1.7e9, read_s=1.0, checked_s=1.25, ended_s=ended_s, answer_id="cmpl-1", status=200
    )
    record.outputs = [OutputRecord(attempts=list(attempts))]
    return record


def told(record: RequestRecord) -> TimelineOutput:
    (output,) = compose(record, ingress="ingress-1").outputs
    position = 0.0
    for span in output.spans:
        assert span.start_s == pytest.approx(position, abs=1e-6)
        position += span.duration_s
    assert position == pytest.approx(record.latency_s, abs=1e-6)
    return output


def shape(output: TimelineOutput) -> list[tuple[str, str, float]]:
    return [(span.name, span.replica, round(span.duration_s, 6)) for span in output.spans]


def test_an_engines_spans_stand_between_the_ways_there_and_back() -> None:
    attempt = attempt_at(2.0)
    attempt.hear(1, FIRST, 6.5)
    attempt.hear(9, WHOLE, 11.5)
    output = told(record_of(attempt, ended_s=12.0))
    assert shape(output) == [
        ("read", "ingress-1", 1.0),
        ("check", "ingress-1", 0.25),
        ("prepare", "ingress-1", 0.75),
        ("route", "ingress-1", 0.5),
        ("wire", "", 0.5),
        ("queue", "decode-1", 1.0),
        ("prefill", "decode-1", 2.0),
        ("first_decode", "decode-1", 0.5),
        ("decode", "decode-1", 4.5),
        ("wire", "", 0.5),
        ("answer", "ingress-1", 0.5),
    ]
    assert [span.attempt for span in output.spans] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert output.spans[6].num_steps == 3
    assert (output.ttft_s, output.num_tokens) == (6.5, 10)


def test_the_first_token_is_not_told_to_have_come_before_it_was_there() -> None:
    """The way back of the last tokens was long: the way there cannot have been half of all ways."""
    attempt = attempt_at(2.0)
    attempt.hear(1, FIRST, 5.6)
    attempt.hear(9, WHOLE, 15.0)
    spans = told(record_of(attempt)).spans
    there, back = [span.duration_s for span in spans if span.name == "wire"]
    assert [there, back] == pytest.approx([0.1, 4.4])


def test_parts_on_prefill_are_prefills_and_ways_between_engines_are_nobodys() -> None:
    remote = (EngineSpan("wire", 0.1), EngineSpan("prefill", 2.0, 4, True), EngineSpan("wire", 0.1))
    attempt = attempt_at(2.0, prefill="prefill-1")
    attempt.hear(1, RequestTiming(spans=remote, kv_read_s=1.5, kv_read_bytes=7), 5.0)
    output = told(record_of(attempt))
    assert ("prefill", "prefill-1", 2.0) in shape(output)
    assert [span.replica for span in output.spans if span.name == "wire"] == [""] * 4
    assert (output.attempts[0].prefill, output.attempts[0].kv_read_s, output.attempts[0].kv_read_bytes) == (
        "prefill-1",
        1.5,
        7,
    )


def test_an_engine_that_is_lost_has_told_of_its_first_token_and_the_rest_is_seen_from_here() -> None:
    lost, second = attempt_at(2.0), attempt_at(9.0, engine="decode-2")
    lost.hear(1, FIRST, 6.5)
    lost.hear(5, None, 8.0)
    lost.ended_s, lost.error = 9.0, "EngineLost"
    second.hear(4, WHOLE, 18.5)
    output = told(record_of(lost, second))
    names = [(span.name, span.attempt, round(span.duration_s, 6)) for span in output.spans]
    assert names[7:10] == [("wire", 1, 0.5), ("decode", 1, 1.5), ("unattributed", 1, 1.0)]
    assert [attempt.error for attempt in output.attempts] == ["EngineLost", ""]
    assert [attempt.num_tokens for attempt in output.attempts] == [6, 4]
    assert output.ttft_s == 6.5


def test_an_engine_that_said_nothing_leaves_its_time_unattributed() -> None:
    silent = attempt_at(2.0)
    silent.ended_s, silent.error = 9.0, "EngineLost"
    waiting = AttemptRecord(9.0, error="NotReady")
    waiting.note("wait_for_engine", 10.0)
    waiting.note("wait_for_engine", 19.0)
    output = told(record_of(silent, waiting))
    assert shape(output)[4:] == [
        ("unattributed", "decode-1", 6.5),
        ("wait_for_engine", "ingress-1", 10.0),
        ("answer", "ingress-1", 1.0),
    ]
    assert output.ttft_s is None


def test_an_answer_that_its_stop_string_cut_ends_with_its_last_token() -> None:
    attempt = attempt_at(2.0)
    attempt.hear(1, FIRST, 6.5)
    attempt.hear(5, None, 8.0)
    attempt.ended_s = 8.1
    assert shape(told(record_of(attempt, ended_s=8.2)))[-2:] == [
        ("decode", "decode-1", 1.5),
        ("answer", "ingress-1", 0.2),
    ]


def test_a_clock_that_runs_faster_shows_and_breaks_no_sum() -> None:
    attempt = attempt_at(2.0)
    attempt.hear(1, WHOLE, 10.0)  # it claims 8 seconds of 7.5
    output = told(record_of(attempt))
    assert [span.duration_s for span in output.spans if span.name == "unattributed"] == [pytest.approx(-0.5)]


@given(
    gaps=st.lists(st.floats(0, 10), min_size=6, max_size=6),
    spans=st.lists(st.floats(0, 3), max_size=6),
    ends=st.sampled_from(("well", "lost", "silent")),
)
def test_spans_add_up_whatever_there_was(gaps: list[float], spans: list[float], ends: str) -> None:
    times = [sum(gaps[: index + 1]) for index in range(6)]
    attempt = AttemptRecord(times[1], engine="e", sent_s=times[2])
    attempt.note("route", times[2])
    if ends != "silent":
        attempt.hear(1, RequestTiming(spans=tuple(EngineSpan("decode", length) for length in spans)), times[3])
    attempt.ended_s, attempt.error = times[4], "" if ends == "well" else "EngineLost"
    record = record_of(attempt, ended_s=times[5])
    record.read_s = record.checked_s = times[0]
    told(record)


def test_only_so_many_outputs_and_attempts_are_told() -> None:
    record = record_of()
    record.outputs = [OutputRecord(clock=lambda: 3.0) for _ in range(MAX_OUTPUTS + 5)]
    for number in range(50):
        record.outputs[0].begin_attempt().engine = str(number)
    timeline = compose(record, ingress="i")
    assert (timeline.num_outputs, len(timeline.outputs)) == (MAX_OUTPUTS + 5, MAX_OUTPUTS)
    assert len(timeline.outputs[0].attempts) == MAX_ATTEMPTS
    assert timeline.outputs[0].attempts[-1].engine == "49"


# --- the store


def kept(store: TimelineStore, answer_id: str, request_id: str) -> None:
    record = record_of()
    record.answer_id, record.request_id = answer_id, request_id
    store.begin(record)
    assert store.find(answer_id)[0] == "running"
    store.end(compose(record, ingress="i"))


def test_the_latest_are_found_by_both_ids_and_older_ones_are_gone() -> None:
    store = TimelineStore(3)
    for number in range(5):
        kept(store, f"cmpl-{number}", f"mine-{number}")
    assert [store.find(f"cmpl-{number}")[0] for number in range(5)] == ["unknown"] * 2 + ["kept"] * 3
    state, text = store.find("mine-4")
    assert state == "kept" and msgspec.json.decode(text)["id"] == "cmpl-4"
    assert store.find("mine-1") == ("unknown", b"")
    assert len(store._id_by_request_id) == 3 and not store._open


def test_of_requests_with_one_request_id_the_latest_is_found_by_it() -> None:
    store = TimelineStore(2)
    record = record_of()
    record.answer_id, record.request_id = "cmpl-1", "mine"
    store.begin(record)
    assert store.find("mine")[0] == "running"
    store.end(compose(record, ingress="i"))
    kept(store, "cmpl-2", "mine")
    assert msgspec.json.decode(store.find("mine")[1])["id"] == "cmpl-2"
    kept(store, "cmpl-3", "other")  # the first one leaves; the id still means the second
    assert msgspec.json.decode(store.find("mine")[1])["id"] == "cmpl-2"


def test_a_store_may_keep_nothing() -> None:
    store = TimelineStore(0)
    kept(store, "cmpl-1", "mine")
    assert store.find("cmpl-1") == ("unknown", b"")
