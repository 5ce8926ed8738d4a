"""An engine that was told to stop: what it finishes, what moves and when, and that whoever gets it goes on."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.errors import NotReady
from atom_cluster.messages.transfer import KvPublication, PrefillFailed
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_FAILURES, REQUESTS_FINISHED, REQUESTS_MOVED
from tests.engine.split import CLIENT, Split, make_split
from tests.factories import TRANSFER, assert_clean, expected_tokens, make_engine, make_message, make_prompt, make_runner
from tests.fakes import Answer, Network, VirtualClock

PROMPT = make_prompt(10)


def make_single(
    metrics: MemoryMetrics | None = None, *, num_rows: int = 8, names: tuple[str, ...] = ("old", "new")
) -> Network:
    """Two engines that know nothing of each other. A step of either takes 5 ms."""
    network = Network(VirtualClock())
    for name in names:
        runner = make_runner(network.clock, num_rows=num_rows)
        make_engine(network, name, runner=runner, metrics=metrics if name == "old" else None)
    return network


def turns_until_token(network: Network, request_id: str, count: int) -> None:
    for _ in range(200):
        if len(network.answers.get(request_id, Answer()).tokens) >= count:
            return
        network.turn()
    raise AssertionError(f"{request_id} has not got {count} tokens")


def go_on(network: Network, request_id: str, *, max_tokens: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What the ingress does with a request that moves; all tokens that its client has in the end."""
    answer = network.answers[request_id]
    assert answer.error_kind == "NotReady"
    message = make_message(request_id + "+", prompt, max_tokens)
    network.answers[request_id + "+"] = Answer(tokens=list(answer.tokens))
    network.engines["new"].put(CLIENT, msgspec.structs.replace(message, emitted=tuple(answer.tokens)))
    network.settle()
    assert network.answers[request_id + "+"].reason == "length"
    return network.answers[request_id + "+"].tokens


def test_what_runs_is_finished_within_the_time_and_nothing_new_is_taken() -> None:
    metrics = MemoryMetrics()
    network = make_single(metrics)
    network.engines["old"].put(CLIENT, make_message("running", PROMPT, 20))
    turns_until_token(network, "running", 3)
    network.engines["old"].begin_drain(10.0)
    network.engines["old"].put(CLIENT, make_message("late", PROMPT, 5))
    network.settle()
    assert network.answers["running"].tokens == expected_tokens(PROMPT, 20)
    late = network.answers["late"]
    assert (late.error_kind, late.tokens) == ("NotReady", [])
    assert metrics.value(REQUESTS_FINISHED, reason="error") == metrics.value(REQUESTS_MOVED) == 0
    assert_clean(network.engines["old"])


def test_what_was_not_begun_leaves_at_once() -> None:
    network = make_single(num_rows=1)
    network.engines["old"].put(CLIENT, make_message("running", PROMPT, 20))
    network.engines["old"].put(CLIENT, make_message("waiting", PROMPT, 20))
    turns_until_token(network, "running", 3)
    network.engines["old"].begin_drain(10.0)
    network.step("old")
    assert network.answers["waiting"].error_kind == "NotReady"
    assert network.answers["running"].final is None
    network.settle()
    assert network.answers["running"].reason == "length"
    assert go_on(network, "waiting", max_tokens=20) == expected_tokens(PROMPT, 20)


@pytest.mark.parametrize(
    ("sampling", "leaves"),
    [
        ({"ignore_eos": True}, True),
        ({"min_tokens": 60}, True),
        ({}, False),
        ({"min_tokens": 10}, False),
        ({"ignore_eos": True, "stop_token_ids": (7,)}, False),
    ],
)
def test_what_is_sure_to_take_longer_than_there_is_time_leaves_at_once(
    sampling: dict[str, object], leaves: bool
) -> None:
    """80 tokens of 5 ms each in 0.2 s. That it may end sooner is reason enough to let it try."""
    metrics = MemoryMetrics()
    network = make_single(metrics)
    network.engines["old"].put(CLIENT, make_message("r", PROMPT, 80, **sampling))  # type: ignore[arg-type]
    turns_until_token(network, "r", 10)
    network.engines["old"].begin_drain(0.2)
    network.step("old")
    assert (network.answers["r"].error_kind == "NotReady") == leaves
    assert metrics.value(REQUESTS_MOVED) == leaves


def test_when_time_is_up_the_rest_goes_on_elsewhere_behind_its_tokens() -> None:
    metrics = MemoryMetrics()
    network = make_single(metrics)
    network.engines["old"].put(CLIENT, make_message("r", PROMPT, 80))
    turns_until_token(network, "r", 10)
    network.engines["old"].begin_drain(0.1)
    began_s = network.clock.at_s
    network.settle()
    assert network.clock.at_s - began_s < 0.2
    assert 20 <= len(network.answers["r"].tokens) <= 35
    assert metrics.value(REQUESTS_MOVED) == 1 and metrics.value(REQUESTS_FINISHED, reason="error") == 0
    assert_clean(network.engines["old"])
    assert go_on(network, "r", max_tokens=80) == expected_tokens(PROMPT, 80)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(0, 30), num_drafts=st.integers(0, 3), timeout_s=st.sampled_from((0.0, 0.02, 0.1)))
def test_no_token_is_lost_or_doubled_wherever_it_moves(num_tokens: int, num_drafts: int, timeout_s: float) -> None:
    network = Network(VirtualClock())
    for name in ("old", "new"):
        make_engine(network, name, runner=make_runner(network.clock, max_drafts=num_drafts))
    network.engines["old"].put(CLIENT, make_message("r", PROMPT, 40))
    turns_until_token(network, "r", num_tokens)
    network.engines["old"].begin_drain(timeout_s)
    network.settle()
    assert_clean(network.engines["old"])
    if network.answers["r"].reason == "length":
        assert network.answers["r"].tokens == expected_tokens(PROMPT, 40)
    else:
        assert go_on(network, "r", max_tokens=40) == expected_tokens(PROMPT, 40)


def test_a_second_call_may_shorten_the_time() -> None:
    network = make_single()
    network.engines["old"].put(CLIENT, make_message("r", PROMPT, 80))
    turns_until_token(network, "r", 5)
    network.engines["old"].begin_drain(100.0)
    network.engines["old"].begin_drain(0.05)
    network.engines["old"].begin_drain(100.0)
    network.settle()
    assert network.answers["r"].error_kind == "NotReady"


# --- with prompts under way between two engines


def drain(split: Split, name: str, timeout_s: float) -> None:
    split.network.engines[name].begin_drain(timeout_s)


def test_prefill_finishes_its_prompts_and_refuses_others() -> None:
    split = make_split(prefill_budget=8)
    split.send("old", 78)
    split.turns_until(split.has_carried(KvPublication))
    drain(split, "prefill", 10.0)
    split.send("new", make_prompt(30, seed=1))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert split.metrics.value(KV_TRANSFER_FAILURES, reason="prefill_failed") == 1
    (failed,) = split.network.messages(PrefillFailed)
    assert isinstance(failed, PrefillFailed) and failed.kind == NotReady.__name__


def test_when_its_time_is_up_prefill_gives_its_prompts_back() -> None:
    split = make_split(prefill_budget=8, transfer=TRANSFER.model_copy(update={"prefill_timeout_s": 1000.0}))
    split.send(prompt=78)
    split.turns_until(split.has_carried(KvPublication))
    drain(split, "prefill", 0.0)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert split.metrics.value(KV_TRANSFER_FAILURES, reason="prefill_failed") == 1


def test_what_prefill_has_published_is_still_read() -> None:
    split = make_split(prefill_budget=64, kv_bytes_per_s=2e7)
    split.send()
    split.turns_until(lambda: bool(split.answer().tokens))
    drain(split, "prefill", 0.0)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert split.metrics.value(KV_TRANSFER_FAILURES, reason="prefill_failed") == 0


@pytest.mark.parametrize("num_turns", range(0, 24, 2))
def test_a_draining_decode_gives_up_prompts_that_prefill_computes_and_both_are_free(num_turns: int) -> None:
    split = make_split(prefill_budget=8)
    split.send(prompt=40, max_tokens=50)
    for _ in range(num_turns):
        split.network.turn()
    drain(split, "decode", 0.0)
    split.network.settle()
    split.assert_clean()
    answer = split.answer()
    assert answer.error_kind == "NotReady"
    assert answer.tokens == expected_tokens(make_prompt(40), 50)[: len(answer.tokens)]
