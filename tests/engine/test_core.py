from __future__ import annotations

import gc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import StepRunner
from atom_cluster.engine.request import Request
from atom_cluster.messages.requests import CancelRequest, EngineRequest, TokenBatch
from atom_cluster.messages.transfer import PrefillFailed, TicketRelease
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import (
    GENERATION_TOKENS,
    PREEMPTIONS,
    PREFIX_CACHE_HITS,
    PREFIX_CACHE_QUERIES,
    PROMPT_TOKENS,
    REQUESTS_FINISHED,
)
from tests.engine.split import make_split
from tests.factories import (
    MAX_MODEL_LEN,
    assert_clean,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
    pool_of,
)
from tests.fakes import Answer, FailingRunner, ListOutbox, Network, RecordingRunner, VirtualClock

CLIENT = "ingress"


@dataclass
class Single:
    """One engine and its clients."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_blocks: int = 64
    num_rows: int = 8
    samples_eos: bool = False
    prefix_caching: bool = True
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    network: Network = field(default_factory=lambda: Network(VirtualClock()))
    engine: EngineCore = field(init=False)
    runner: RecordingRunner = field(init=False)

    def __post_init__(self) -> None:
        device = make_runner(self.network.clock, num_blocks=self.num_blocks, num_rows=self.num_rows)
        self.runner = RecordingRunner(device, samples_eos=self.samples_eos)
        self.engine = make_engine(
            self.network,
            runner=self.runner,
            scheduler=self.scheduler,
            metrics=self.metrics,
            prefix_caching=self.prefix_caching,
        )
        self.network.after_step = lambda: pool_of(self.engine).check_integrity()

    def send(self, message: EngineRequest, client: str = CLIENT) -> None:
        self.engine.put(client, message)

    def answer(self, request_id: str = "r") -> Answer:
        return self.network.answers.setdefault(request_id, Answer())

    def finish(self) -> None:
        self.network.settle()
        assert_clean(self.engine)

    def ask(self, message: EngineRequest) -> Answer:
        self.send(message)
        self.finish()
        return self.answer(message.request_id)


# --- the same tokens, however they are computed


CONFIGS = {
    "asynchronous": SchedulerConfig(),
    "synchronous": SchedulerConfig(async_scheduling=False),
    "small chunks": SchedulerConfig(max_num_batched_tokens=5),
    "two tokens a step": SchedulerConfig(max_num_batched_tokens=2),
    "long prompts cut": SchedulerConfig(long_prefill_tokens=3),
    "prefill first": SchedulerConfig(policy="prefill_first"),
    "decode only": SchedulerConfig(policy="decode_only", async_scheduling=False),
    "whole prompts": SchedulerConfig(chunked_prefill=False, max_num_batched_tokens=MAX_MODEL_LEN),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_blocks", [13, 64])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_depend_on_the_prompt_only(config: SchedulerConfig, num_blocks: int, prefix_caching: bool) -> None:
    single = Single(config, num_blocks=num_blocks, prefix_caching=prefix_caching)
    prompts = {f"r{number}": (*make_prompt(3 * number + 1, number % 2), number) for number in range(10)}
    for number, (request_id, prompt) in enumerate(prompts.items()):
        single.send(make_message(request_id, prompt, 12))
        if number % 4 == 0:
            single.engine.step()
    single.finish()
    for request_id, prompt in prompts.items():
        assert single.answer(request_id).tokens == expected_tokens(prompt, 12)
        assert single.answer(request_id).reason == "length"
    if config.max_num_batched_tokens > 2:
        assert (single.metrics.value(PREEMPTIONS) > 0) == (num_blocks == 13)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 12), st.integers(0, 1), st.integers(0, 3)),
        min_size=1,
        max_size=25,
    ),
    config=st.builds(
        SchedulerConfig,
        max_num_batched_tokens=st.sampled_from((3, 16, 200)),
        policy=st.sampled_from(("mixed", "prefill_first", "decode_only")),
        async_scheduling=st.booleans(),
        max_num_requests=st.integers(1, 8),
    ),
    num_blocks=st.integers(11, 40),
    cancelled=st.sets(st.integers(0, 24)),
)
def test_no_request_of_a_random_trace_is_lost_wrong_or_leaves_anything_behind(
    requests: list[tuple[int, int, int, int, int]], config: SchedulerConfig, num_blocks: int, cancelled: set[int]
) -> None:
    single = Single(config, num_blocks=num_blocks)
    prompts = [(*make_prompt(length, family), number) for number, (family, length, *_) in enumerate(requests)]
    for number, (_, _, max_tokens, priority, gap) in enumerate(requests):
        single.send(make_message(f"r{number}", prompts[number], max_tokens, priority=priority))
        for _ in range(gap):
            single.engine.step()
        if number in cancelled:
            single.engine.put(CLIENT, CancelRequest(f"r{number}"))
    single.finish()
    for number, (_, _, max_tokens, _, _) in enumerate(requests):
        answer, expected = single.answer(f"r{number}"), expected_tokens(prompts[number], max_tokens)
        assert answer.tokens == expected[: len(answer.tokens)]
        assert number in cancelled or (len(answer.tokens) == max_tokens and answer.reason == "length")


def test_tokens_found_in_the_cache_are_counted_and_change_nothing() -> None:
    single = Single()
    cold = single.ask(make_message("cold", 18, 6))
    warm = single.ask(make_message("warm", 18, 6))
    assert warm.tokens == cold.tokens
    assert cold.final is not None
    assert warm.final is not None
    assert (cold.final.num_cached_tokens, warm.final.num_cached_tokens) == (0, 16)
    assert single.metrics.value(PREFIX_CACHE_QUERIES) == 36
    assert single.metrics.value(PREFIX_CACHE_HITS) == 16


def test_output_is_cached_too() -> None:
    single = Single()
    first = single.ask(make_message("first", 10, 11))
    again = single.ask(make_message("again", (*make_prompt(10), *first.tokens), 1))
    assert again.final is not None
    assert again.final.num_cached_tokens == 20


def test_a_preempted_request_counts_its_cached_tokens_once() -> None:
    single = Single(num_blocks=10)
    for number in range(3):
        single.send(make_message(f"r{number}", make_prompt(10, number), 20))
    single.finish()
    assert single.metrics.value(PREEMPTIONS) > 0
    assert single.metrics.value(PREFIX_CACHE_QUERIES) == single.metrics.value(PROMPT_TOKENS) == 30
    assert single.metrics.value(GENERATION_TOKENS) == 60
    finals = [single.answer(f"r{number}").final for number in range(3)]
    assert [final is not None and final.num_cached_tokens for final in finals] == [0, 0, 0]


# --- how answers end


@pytest.mark.parametrize("is_async", [True, False])
def test_what_was_computed_past_the_end_of_sequence_is_dropped(is_async: bool) -> None:
    expected = expected_tokens(make_prompt(10), 6)
    single = Single(SchedulerConfig(async_scheduling=is_async), samples_eos=True)
    answer = single.ask(make_message("r", 10, 20, eos=(expected[3],)))
    assert (answer.tokens, answer.reason) == (expected[:4], "stop")
    num_computed = max(row.start + row.num_tokens for plan in single.runner.plans for row in plan.rows)
    assert num_computed == (14 if is_async else 13)


def test_blocks_of_a_request_that_ended_unexpectedly_serve_the_next_one_at_once() -> None:
    single = Single(num_blocks=6, num_rows=1, samples_eos=True)
    expected = expected_tokens(make_prompt(20), 2)
    single.send(make_message("ends", 20, 4, eos=(expected[1],)))
    single.send(make_message("next", make_prompt(20, 5), 4))
    single.finish()
    assert single.answer("ends").tokens == expected
    assert single.answer("next").tokens == expected_tokens(make_prompt(20, 5), 4)


def test_a_stop_token_is_part_of_the_answer_and_ends_it() -> None:
    expected = expected_tokens(make_prompt(10), 6)
    answer = Single().ask(make_message("r", 10, 20, stop_token_ids=(expected[2],)))
    assert (answer.tokens, answer.reason) == (expected[:3], "stop")


def test_an_ignored_end_of_sequence_ends_nothing() -> None:
    expected = expected_tokens(make_prompt(10), 6)
    answer = Single(samples_eos=True).ask(make_message("r", 10, 6, eos=(expected[1],), ignore_eos=True))
    assert (answer.tokens, answer.reason) == (expected, "length")


def test_no_stop_token_ends_an_answer_before_min_tokens() -> None:
    expected = expected_tokens(make_prompt(10), 6)
    answer = Single().ask(make_message("r", 10, 8, stop_token_ids=(expected[1],), min_tokens=4))
    assert len(answer.tokens) >= 4
    assert expected[1] not in answer.tokens[:3]


@pytest.mark.parametrize("is_async", [True, False])
def test_an_answer_can_fill_the_context_to_the_last_token(is_async: bool) -> None:
    single = Single(SchedulerConfig(async_scheduling=is_async))
    answer = single.ask(make_message("r", MAX_MODEL_LEN - 7, 500))
    assert (len(answer.tokens), answer.reason) == (7, "length")
    answer = single.ask(make_message("one", MAX_MODEL_LEN - 1, 500))
    assert (len(answer.tokens), answer.reason) == (1, "length")


def test_an_answer_says_where_its_time_went() -> None:
    single = Single(num_rows=1)
    single.send(make_message("first", 10, 10))
    single.send(make_message("second", make_prompt(10, 1), 10))
    single.finish()
    final = single.answer("second").final
    assert final is not None
    assert final.timing is not None
    assert final.timing.seconds_in("queue") >= 9 * 0.005
    assert final.timing.seconds_in("prefill") >= 0.005
    assert final.timing.seconds_in("first_decode", "decode") >= 9 * 0.005


# --- clients that misbehave or leave


@pytest.mark.parametrize("num_turns", range(8))
@pytest.mark.parametrize("is_async", [True, False])
def test_a_cancelled_request_says_nothing_more_and_gives_everything_back(num_turns: int, is_async: bool) -> None:
    single = Single(SchedulerConfig(max_num_batched_tokens=4, async_scheduling=is_async), num_rows=2)
    for number in range(3):
        single.send(make_message(f"r{number}", make_prompt(10, number), 5))
    for _ in range(num_turns):
        single.engine.step()
    single.engine.put(CLIENT, CancelRequest("r1"))
    single.engine.step()
    num_heard = len(single.answer("r1").tokens)
    single.finish()
    assert len(single.answer("r1").tokens) == num_heard
    assert single.answer("r0").tokens == expected_tokens(make_prompt(10, 0), 5)
    assert single.answer("r2").tokens == expected_tokens(make_prompt(10, 2), 5)


def test_only_who_sent_a_request_can_cancel_it() -> None:
    single = Single()
    single.send(make_message())
    single.engine.put("somebody else", CancelRequest("r"))
    single.finish()
    assert single.answer().reason == "length"


def test_requests_of_a_client_that_is_gone_end_and_others_go_on() -> None:
    single = Single(num_rows=2)
    for number in range(4):
        single.send(make_message(f"r{number}", make_prompt(10, number)), client=f"client {number % 2}")
    for _ in range(3):
        single.engine.step()
    single.engine.drop_peer("client 0")
    single.finish()
    assert [single.answer(f"r{number}").reason for number in range(4)] == [None, "length", None, "length"]
    assert single.metrics.value(REQUESTS_FINISHED, reason="abort") == 2


def test_a_request_id_in_use_is_refused_to_others_and_can_be_used_again_later() -> None:
    outbox = ListOutbox()
    engine = make_engine(Network(VirtualClock()), outbox=outbox)
    engine.put("first", make_message())
    engine.step()
    engine.put("second", make_message())
    while engine.step():
        pass
    engine.put("second", make_message())
    while engine.step():
        pass
    heard = [(to, delta) for to, message in outbox.sent if isinstance(message, TokenBatch) for delta in message.deltas]
    ends = [(to, delta.finish_reason) for to, delta in heard if delta.finish_reason]
    assert ends == [("second", "error"), ("first", "length"), ("second", "length")]


def test_bad_requests_are_refused_by_field_and_harm_nobody() -> None:
    single = Single()
    single.send(make_message("good", 10, 5))
    single.send(make_message("empty", ()))
    single.send(make_message("long", MAX_MODEL_LEN))
    single.send(make_message("unknown token", (1, 10**6)))
    single.send(make_message("max_tokens", 10, 0))
    single.finish()
    assert single.answer("good").reason == "length"
    kinds = {name: single.answer(name).error_kind for name in ("empty", "long", "unknown token", "max_tokens")}
    assert kinds == {
        "empty": "InvalidRequest",
        "long": "ContextLengthExceeded",
        "unknown token": "InvalidRequest",
        "max_tokens": "InvalidRequest",
    }
    final = single.answer("max_tokens").final
    assert final is not None
    assert final.error is not None
    assert final.error.param == "max_tokens"


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    single = Single(SchedulerConfig(max_waiting_requests=2), num_rows=1)
    for number in range(5):
        single.send(make_message(f"r{number}", 10, 5))
    single.finish()
    kinds = [single.answer(f"r{number}").error_kind for number in range(5)]
    assert kinds == [None, None, "Overloaded", "Overloaded", "Overloaded"]
    final = single.answer("r4").final
    assert final is not None
    assert final.error is not None
    assert final.error.retry_after_s is not None


def test_a_deadline_ends_a_request_whether_it_runs_or_waits() -> None:
    single = Single(num_rows=1)
    single.send(make_message("runs", 10, 80, deadline_s=0.1))
    single.send(make_message("waits", 10, 80, deadline_s=0.05))
    single.send(make_message("patient", 10, 4, deadline_s=50.0))
    single.finish()
    assert single.answer("runs").error_kind == single.answer("waits").error_kind == "RequestTimeout"
    assert 0 < len(single.answer("runs").tokens) < 80
    assert single.answer("waits").tokens == []
    assert single.answer("patient").reason == "length"


def test_a_deadline_does_not_outlive_its_request() -> None:
    single = Single()
    single.ask(make_message("r", 10, 2, deadline_s=0.3))
    del single.network.answers["r"]
    assert single.ask(make_message("r", 10, 80)).reason == "length"
    assert single.network.clock.at_s > 0.3


def test_a_request_that_is_over_is_not_kept_until_its_deadline() -> None:
    single = Single()
    single.ask(make_message("over and gone", 10, 2, deadline_s=1e6))
    gc.collect()
    kept = [item for item in gc.get_objects() if type(item) is Request and item.request_id == "over and gone"]
    assert not kept


# --- the end of a device


def fail(runner: StepRunner, single_step: int) -> FailingRunner:
    return FailingRunner(runner, fails_at=single_step)


def test_when_the_device_fails_every_client_is_told_and_the_engine_stops() -> None:
    network = Network(VirtualClock())
    engine = make_engine(network, runner=fail(make_runner(network.clock, num_rows=2), 2))
    for number in range(4):
        engine.put(CLIENT, make_message(f"r{number}", make_prompt(10, number)))
    with pytest.raises(RuntimeError, match="the device is gone"):
        network.settle()
    answers = [network.answers[f"r{number}"] for number in range(4)]
    assert [answer.error_kind for answer in answers] == ["EngineLost"] * 4
    assert [len(answer.tokens) for answer in answers] == [2, 2, 0, 0]


def test_when_a_prefill_device_fails_decode_is_told_and_computes_the_prompt() -> None:
    split = make_split()
    device = make_runner(split.network.clock)
    make_engine(
        split.network,
        "prefill",
        runner=fail(device, 1),
        scheduler=SchedulerConfig(max_num_batched_tokens=8),
        epoch=9,
    )
    split.send()
    with pytest.raises(RuntimeError, match="the device is gone"):
        split.network.settle()
    split.network.deliver()
    split.network.remove("prefill")
    split.network.settle()
    split.assert_right()
    assert len(split.network.messages(PrefillFailed)) == 1


def test_when_a_decode_device_fails_prefill_gets_its_blocks_back_at_once() -> None:
    split = make_split(kv_bytes_per_s=2e6)
    device = make_runner(split.network.clock, kv_bytes_per_s=2e6)
    make_engine(split.network, "decode", runner=fail(device, 1), epoch=9)
    split.send()
    with pytest.raises(RuntimeError, match="the device is gone"):
        split.network.settle()
    assert split.answer().error_kind == "EngineLost"
    split.network.deliver()
    split.network.remove("decode")
    split.network.step("prefill")
    split.network.step("prefill")
    split.assert_clean()
    assert len(split.network.messages(TicketRelease)) == 1


def test_requests_that_came_too_late_for_a_failed_device_are_refused() -> None:
    network = Network(VirtualClock())
    runner = fail(make_runner(network.clock), 0)
    engine = make_engine(network, runner=runner, scheduler=SchedulerConfig(async_scheduling=False))
    collect = runner.collect

    def collect_late(timeout_s: float | None = None) -> object:
        engine.put(CLIENT, make_message("late"))
        return collect(timeout_s)

    runner.collect = collect_late  # type: ignore[assignment, method-assign]
    engine.put(CLIENT, make_message("early"))
    with pytest.raises(RuntimeError):
        engine.step()
    assert network.answers["early"].error_kind == network.answers["late"].error_kind == "EngineLost"


# --- waiting


def test_an_engine_sleeps_only_when_a_turn_changed_nothing() -> None:
    single = Single(num_rows=1, scheduler=SchedulerConfig(async_scheduling=False))
    for number in range(3):
        single.send(make_message(f"r{number}", make_prompt(10, number), 2))
    patience: list[float] = []
    while single.engine.step() or not patience:
        patience.append(single.engine._patience(1.0))
    assert set(patience) == {0.0}
    for _ in range(3):  # the row of the last one is freed
        single.engine.step()
    assert single.engine._patience(1.0) == 1.0


def test_an_engine_that_only_waits_for_others_sleeps() -> None:
    split = make_split()
    split.network.alter = lambda source, target, message: None
    split.send()
    for _ in range(3):
        split.decode.step()
    assert split.decode.stats().num_tickets == 1
    assert 0.001 <= split.decode._patience(1.0) <= 0.1


def test_an_engine_that_waits_for_its_reads_looks_often_but_does_not_spin() -> None:
    split = make_split(kv_bytes_per_s=2e6, prefill_budget=64)
    split.send()
    split.turns_until(lambda: split.decode.stats().blocks_by_state["arriving"] == 8 and bool(split.answer().tokens))
    for _ in range(3):
        split.decode.step()
    assert 0.0 < split.decode._patience(1.0) <= 0.002


def test_a_message_wakes_an_engine_up() -> None:
    single = Single()
    single.engine.step()
    single.send(make_message())
    single.engine.step(wait_s=30.0)
    assert single.engine.stats().num_running == 1
    single.finish()
