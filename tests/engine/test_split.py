from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.engine.protocols import EngineOutput, RunnerInfo
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.messages.transfer import (
    ConnectPeer,
    DropPeer,
    KvOffer,
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    ReadBlocks,
    TagBlocks,
    TicketRelease,
    TicketRenew,
)
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import (
    KV_BAD_BLOCKS,
    KV_EXPOSED_S,
    KV_PUBLISH_S,
    KV_TRANSFER_BYTES,
    KV_TRANSFER_FAILURES,
    PREEMPTIONS,
)
from tests.engine.split import CLIENT, Split, make_split
from tests.factories import TRANSFER, make_engine, make_message, make_prompt, make_runner, pool_of
from tests.fakes import RecordingRunner

STEP = SimulationConfig()
"""What a step of the simulated device takes."""
SLOW = 2e6
"""Bytes per second at which one simulated block takes 0.26 s."""

FROM_PREFILL = (PrefillAccepted, KvPublication, PrefillFailed)
FROM_DECODE = (PrefillOrder, TicketRenew, TicketRelease)


def computed_positions(runner: RecordingRunner) -> list[tuple[int, int]]:
    return [(row.start, row.num_tokens) for plan in runner.plans for row in plan.rows]


def read_commands(split: Split) -> list[ReadBlocks]:
    return [command for plan in split.decode_runner.plans for command in plan.kv if isinstance(command, ReadBlocks)]


def failures(split: Split, reason: str) -> float:
    return split.metrics.value(KV_TRANSFER_FAILURES, reason=reason)


# --- equal to one engine


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=12),
    seed=st.integers(0, 100),
    budget=st.sampled_from((5, 8, 64)),
)
def test_two_engines_say_what_one_would_for_prompts_with_common_prefixes(
    lengths: list[tuple[int, int, int]], seed: int, budget: int
) -> None:
    split = make_split(seed, prefill_budget=budget)
    for number, (family, num_tokens, max_tokens) in enumerate(lengths):
        split.send(f"r{number}", (*make_prompt(num_tokens, family), number), max_tokens)
        if number % 3 == 0:
            split.network.turn()
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert not split.network.messages(PrefillFailed)


def test_decode_computes_nothing_of_a_prompt_that_arrived_whole() -> None:
    split = make_split()
    split.send(prompt=30, max_tokens=6)
    split.network.settle()
    split.assert_right()
    assert computed_positions(split.decode_runner) == [(30 + i, 1) for i in range(5)]


def test_blocks_are_published_while_the_rest_of_the_prompt_is_computed() -> None:
    split = make_split(prefill_budget=8)
    split.send(prompt=78)
    split.turns_until(split.has_carried(KvPublication))
    assert split.prefill.stats().num_running == 1
    split.network.settle()
    published = [message for message in split.network.messages(KvPublication) if isinstance(message, KvPublication)]
    assert [message.first_block for message in published] == [*range(0, 20, 2)]
    assert [message.first_token is None for message in published] == [True] * 9 + [False]


def test_only_the_blocks_that_decode_lacks_are_published() -> None:
    split = make_split()
    split.send("first", make_prompt(17), 2)
    split.network.settle()
    split.send("second", make_prompt(30), 4)
    split.network.settle()
    split.assert_right()
    second = read_commands(split)[-2:]
    orders = split.network.messages(PrefillOrder)
    assert isinstance(orders[-1], PrefillOrder)
    assert orders[-1].num_tokens_held == 16
    assert sum(len(command.remote_block_ids) for command in second) == 4
    final = split.answer("second").final
    assert final is not None
    assert final.num_cached_tokens == 16


def test_tokens_cached_on_prefill_count_as_cached() -> None:
    split = make_split()
    split.prefill.put(CLIENT, make_message("local", 20, 1))
    split.network.settle()
    split.send(prompt=30)
    split.network.settle()
    split.assert_right("r")
    final = split.answer().final
    assert final is not None
    assert final.num_cached_tokens == 20


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 12])
def test_a_prompt_that_prefill_has_cached_goes_out_at_once(num_tokens: int) -> None:
    split = make_split()
    split.prefill.put(CLIENT, make_message("local", num_tokens, 4))
    split.network.settle()
    split.send(prompt=num_tokens)
    split.network.settle()
    split.assert_right("r")
    split.assert_clean()


def test_the_first_token_reaches_the_client_before_the_blocks_do() -> None:
    split = make_split(kv_bytes_per_s=SLOW, prefill_budget=64)
    split.send()
    split.turns_until(lambda: bool(split.answer().tokens))
    assert split.decode.stats().blocks_by_state["arriving"] == 8
    split.network.settle()
    split.assert_right()


def test_a_request_of_one_token_ends_with_it_and_waits_for_no_block() -> None:
    split = make_split(kv_bytes_per_s=SLOW)
    split.send(max_tokens=1)
    split.turns_until(lambda: split.answer().reason is not None)
    assert split.decode.stats().blocks_by_state["arriving"] > 0
    split.network.settle()
    split.assert_right()
    split.assert_clean()


def test_a_stop_token_that_prefill_samples_ends_the_request() -> None:
    split = make_split()
    split.send(max_tokens=6)
    split.network.settle()
    first = split.answer().tokens[0]
    message = make_message("stops", 30, 6, prefill=split.prefill_address, stop_token_ids=(first,))
    split.decode.put(CLIENT, message)
    split.network.settle()
    assert (split.answer("stops").tokens, split.answer("stops").reason) == ([first], "stop")
    split.assert_clean()


def test_log_probabilities_of_the_first_token_come_along() -> None:
    split = make_split()
    seen = []
    inner = split.network.post

    def post(source: str, destination: object, message: EngineOutput) -> None:
        seen.append(message)
        inner(source, destination, message)  # type: ignore[arg-type]

    split.network.post = post  # type: ignore[method-assign]
    split.decode.put(CLIENT, make_message("r", 30, 2, prefill=split.prefill_address, logprobs=2))
    split.network.settle()
    deltas = [delta for message in seen for delta in getattr(message, "deltas", ())]
    assert [len(delta.logprobs or ()) for delta in deltas] == [1, 1]


def test_short_prompts_are_computed_where_they_decode() -> None:
    split = make_split(transfer=TRANSFER.model_copy(update={"min_remote_tokens": 16}))
    split.send("short", 15)
    split.send("long", 16)
    split.network.settle()
    split.assert_right()
    orders = [order.request_id for order in split.network.messages(PrefillOrder) if isinstance(order, PrefillOrder)]
    assert orders == ["long"]


def test_without_checksums_blocks_are_published_as_soon_as_they_are_computed() -> None:
    split = make_split(transfer=TRANSFER.model_copy(update={"verify_blocks": False}))
    for number in range(6):
        split.send(f"r{number}", make_prompt(30, number % 3))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert all(command.tags == () for command in read_commands(split))
    assert not any(isinstance(command, TagBlocks) for plan in split.prefill_runner.plans for command in plan.kv)


def test_only_decode_decides_whether_blocks_are_checked() -> None:
    split = make_split()
    make_engine(
        split.network,
        "prefill",
        runner=split.prefill_runner,
        transfer=TRANSFER.model_copy(update={"verify_blocks": False}),
        epoch=9,
    )
    split.send()
    split.network.settle()
    split.assert_right()
    assert all(command.tags for command in read_commands(split)) and read_commands(split)


def test_blocks_without_the_tags_that_were_asked_for_are_not_used() -> None:
    split = make_split()

    def strip(source: str, target: str, message: EngineOutput) -> EngineOutput:
        return msgspec.structs.replace(message, tags=()) if isinstance(message, KvPublication) else message

    split.network.alter = strip
    split.send()
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert failures(split, "protocol") == 1
    assert not read_commands(split)


def test_ranks_are_told_of_all_transports_in_common_in_decodes_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one which cannot connect with the best goes on with the next."""

    def info(runner: RecordingRunner) -> RunnerInfo:
        return dataclasses.replace(runner._inner.info, kv_transports=("ipc@here", "sim", "mori", "tcp"))

    def alter(source: str, target: str, message: EngineOutput) -> EngineOutput:
        if not isinstance(message, PrefillAccepted):
            return message
        more = tuple(KvOffer(name, (name.encode(),)) for name in ("tcp", "ipc@elsewhere", "mori"))
        return msgspec.structs.replace(
            message, export=msgspec.structs.replace(message.export, offers=(*more, *message.export.offers))
        )

    monkeypatch.setattr(RecordingRunner, "info", property(info))
    split = make_split()
    split.network.alter = alter
    split.send()
    split.network.settle()
    split.assert_right()
    (connect,) = [
        command for plan in split.decode_runner.plans for command in plan.kv if isinstance(command, ConnectPeer)
    ]
    assert connect.transport == "sim"
    assert connect.others == (KvOffer("mori", (b"mori",)), KvOffer("tcp", (b"tcp",)))


def test_every_connection_is_prepared_before_the_first_read_and_only_once() -> None:
    split = make_split()
    for number in range(3):
        split.send(f"r{number}", make_prompt(20, number))
    split.network.settle()
    commands = [command for plan in split.decode_runner.plans for command in plan.kv]
    assert isinstance(commands[0], ConnectPeer)
    assert sum(isinstance(command, ConnectPeer) for command in commands) == 1


# --- blocks that prefill has published stay what they are


@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(14, 26), (18, 38)])
def test_prompts_computed_for_others_keep_their_blocks_when_blocks_run_out(num_blocks: int, num_tokens: int) -> None:
    metrics = MemoryMetrics()
    split = make_split(kv_bytes_per_s=5e7, transfer=TRANSFER.model_copy(update={"verify_blocks": False}))
    runner = make_runner(split.network.clock, num_blocks=num_blocks)
    policy = SchedulerConfig(max_num_batched_tokens=8)
    make_engine(
        split.network, "prefill", runner=runner, scheduler=policy, transfer=split.transfer, metrics=metrics, epoch=9
    )
    for number in range(3):
        split.prefill.put(CLIENT, make_message(f"local{number}", make_prompt(5, 50 + number), 24))
        split.prompts[f"local{number}"] = (make_prompt(5, 50 + number), 24)
    for number in range(4):
        split.send(f"r{number}", make_prompt(num_tokens, number))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert metrics.value(PREEMPTIONS) > 0, "the test is to run out of blocks"


def test_many_prompts_on_a_small_prefill_engine_do_not_wait_for_each_other_forever() -> None:
    split = make_split(num_prefill_blocks=10, num_decode_blocks=24, prefill_budget=6)
    for number in range(8):
        split.send(f"r{number}", make_prompt(30, number), 3)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert not split.network.messages(PrefillFailed)


def test_requests_that_arrived_make_way_for_one_before_them_that_lacks_blocks() -> None:
    split = make_split(num_decode_blocks=12, prefill_budget=64)
    split.decode.put(CLIENT, make_message("local", make_prompt(8, 7), 30))
    split.prompts["local"] = (make_prompt(8, 7), 30)
    for number in range(4):
        split.send(f"r{number}", make_prompt(20, number), 20)
    split.network.settle()
    split.assert_right()
    split.assert_clean()


def test_short_prompts_on_their_way_to_prefill_do_not_starve_a_request_that_waits_for_blocks() -> None:
    split = make_split(num_decode_blocks=30, kv_bytes_per_s=1e9)
    split.decode.put(CLIENT, make_message("runs on", make_prompt(4, 97), 60))
    split.decode.put(CLIENT, make_message("in the way", make_prompt(40, 98), 6))
    split.decode.put(CLIENT, make_message("waits", make_prompt(80, 99), 2))
    for number in range(60):
        split.send(f"r{number}", make_prompt(5, number), 3)
    split.turns_until(lambda: bool(split.answer("waits").tokens))
    assert split.answer("in the way").reason == "length"
    assert sum(split.answer(f"r{number}").reason is not None for number in range(60)) < 15
    split.network.settle()
    split.assert_right()
    split.assert_clean()


# --- things go wrong


def test_engines_whose_blocks_mean_different_things_say_in_what_they_differ() -> None:
    split = make_split()
    make_engine(split.network, "prefill", runner=make_runner(split.network.clock, block_size=8), epoch=9)
    split.send()
    split.network.settle()
    split.assert_right()
    refusals = split.network.messages(PrefillFailed)
    assert isinstance(refusals[0], PrefillFailed)
    assert refusals[0].message == "prefill and decode differ in block_size (8 on prefill, 4 on decode)"
    assert failures(split, "prefill_failed") == 1


def test_a_full_queue_on_prefill_leaves_the_prompt_to_decode() -> None:
    split = make_split(prefill_policy=SchedulerConfig(max_waiting_requests=1, max_num_requests=1))
    for number in range(5):
        split.send(f"r{number}", make_prompt(30, number))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    kinds = {message.kind for message in split.network.messages(PrefillFailed) if isinstance(message, PrefillFailed)}
    assert kinds == {"Overloaded"}


def test_prefill_needs_room_for_the_prompt_only() -> None:
    split = make_split(num_prefill_blocks=8)
    split.send(prompt=30, max_tokens=20)
    split.network.settle()
    split.assert_right()
    assert not split.network.messages(PrefillFailed)


@pytest.mark.parametrize(
    ("damaged", "computed"),
    [
        ((3,), [(12, 4)]),
        ((5, 3), [(12, 4), (20, 4)]),
        ((3, 4, 6), [(12, 8), (24, 4)]),
        ((0,), [(0, 4)]),
        ((7,), [(28, 3)]),
        ((0, 7), [(0, 4), (28, 3)]),
        (tuple(range(8)), [(0, 31)]),
    ],
)
def test_damaged_blocks_alone_are_computed_again(damaged: tuple[int, ...], computed: list[tuple[int, int]]) -> None:
    split = make_split(prefill_budget=64)

    def damage(source: str, target: str, message: EngineOutput) -> EngineOutput:
        if isinstance(message, KvPublication):
            for block, block_id in enumerate(message.block_ids, message.first_block):
                if block in damaged:
                    split.prefill_device.corrupt(block_id)
        return message

    split.network.alter = damage
    split.send(prompt=30)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert split.metrics.value(KV_BAD_BLOCKS) == len(damaged)
    # The last block has two tokens of the prompt; behind them comes the first token, from prefill.
    steps = computed_positions(split.decode_runner)
    assert steps[: len(computed)] == computed
    after = 31 if computed[-1] in ((28, 3), (0, 31)) else 30
    assert steps[len(computed)][0] == after


def test_a_request_with_damaged_blocks_that_loses_its_blocks_starts_anew() -> None:
    split = make_split(prefill_budget=64, num_decode_blocks=14)

    def damage(source: str, target: str, message: EngineOutput) -> EngineOutput:
        if isinstance(message, KvPublication) and message.first_block == 0:
            split.prefill_device.corrupt(message.block_ids[1])
        return message

    split.network.alter = damage
    for number in range(4):
        split.send(f"r{number}", make_prompt(17, number), 20)
    split.network.settle()
    assert split.metrics.value(PREEMPTIONS) > 0
    assert split.metrics.value(KV_BAD_BLOCKS) > 0
    split.assert_right()
    split.assert_clean()


@pytest.mark.parametrize("kind", [*FROM_PREFILL[:2], *FROM_DECODE])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lost_message_costs_time_but_no_request_and_no_block(kind: type[EngineOutput], which: int) -> None:
    split = make_split(kv_bytes_per_s=SLOW)
    count = 0

    def lose(source: str, target: str, message: EngineOutput) -> EngineOutput | None:
        nonlocal count
        count += isinstance(message, kind)
        return None if isinstance(message, kind) and count == which + 1 else message

    split.network.alter = lose
    for number in range(3):
        split.send(f"r{number}", make_prompt(20, number))
    split.network.settle()
    assert count > which, "the message was to be lost"
    split.assert_right()
    split.assert_clean()


def test_prefill_is_told_again_that_nobody_waits_for_it() -> None:
    """The first time was lost; it need not wait for the end of the lease."""
    split = make_split(kv_bytes_per_s=SLOW)
    lost: list[EngineOutput] = []

    def lose_first(source: str, target: str, message: EngineOutput) -> EngineOutput | None:
        if not isinstance(message, TicketRelease) or lost:
            return message
        lost.append(message)
        return None

    split.network.alter = lose_first
    split.send("r", make_prompt(40, 1))
    split.network.turn()
    split.decode.put(CLIENT, CancelRequest("r"))
    begun_s = split.network.clock.at_s
    while split.decode.stats().num_tickets or split.prefill.stats().num_tickets:
        split.network.turn()
    assert lost and split.network.clock.at_s - begun_s < split.transfer.lease_s / 2
    split.network.settle()
    split.assert_clean()


@pytest.mark.parametrize("kind", [*FROM_PREFILL[:2], *FROM_DECODE])
def test_a_message_that_comes_twice_doubles_nothing(kind: type[EngineOutput]) -> None:
    split = make_split(kv_bytes_per_s=SLOW)

    def repeat(source: str, target: str, message: EngineOutput) -> EngineOutput:
        if isinstance(message, kind):
            split.network.engines[target].put(source, message)  # type: ignore[arg-type]
        return message

    split.network.alter = repeat
    split.send("r0", make_prompt(20, 1))
    split.send("r1", make_prompt(20, 2))
    split.network.settle()
    split.assert_right()
    split.assert_clean()


@pytest.mark.parametrize("num_turns", range(12))
def test_decode_goes_on_alone_when_prefill_is_lost_at_any_time(num_turns: int) -> None:
    split = make_split(kv_bytes_per_s=2e7)
    split.send("r0", make_prompt(30, 1))
    split.send("r1", make_prompt(9, 2), 1)
    for _ in range(num_turns):
        split.network.turn()
    split.network.remove("prefill")
    split.prefill_device.close()
    split.decode.drop_peer("prefill")
    split.network.settle()
    split.assert_right()
    split.assert_clean()


@pytest.mark.parametrize("num_turns", range(12))
def test_prefill_gets_its_blocks_back_when_decode_is_lost_at_any_time(num_turns: int) -> None:
    split = make_split(kv_bytes_per_s=SLOW)
    split.send("r0", make_prompt(30, 1))
    split.send("r1", make_prompt(9, 2))
    for _ in range(num_turns):
        split.network.turn()
    split.network.remove("decode")
    split.prefill.drop_peer("decode")
    for _ in range(3):
        split.network.turn()
    split.assert_clean()


def test_blocks_that_decode_neither_renews_nor_releases_come_back_when_the_lease_is_over() -> None:
    split = make_split(kv_bytes_per_s=SLOW)
    split.send()
    split.turns_until(split.has_carried(KvPublication))
    split.network.remove("decode")
    for _ in range(10):
        split.network.turn()
    assert split.prefill.stats().num_tickets == 1
    split.network.clock.sleep(TRANSFER.lease_s)
    split.network.turn()
    split.assert_clean()


def test_renewals_keep_the_blocks_of_a_slow_reader() -> None:
    transfer = TRANSFER.model_copy(update={"read_timeout_s": 60.0})
    split = make_split(kv_bytes_per_s=SLOW, prefill_budget=64, transfer=transfer)
    split.send(prompt=60)
    split.turns_until(lambda: split.network.clock.at_s > 2 * TRANSFER.lease_s)
    assert split.prefill.stats().blocks_by_state["leased"] == 15
    split.network.settle()
    split.assert_right()
    assert not split.network.messages(PrefillFailed)


def test_a_read_that_takes_too_long_is_given_up() -> None:
    split = make_split(kv_bytes_per_s=1e5)
    split.send()
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert failures(split, "read_failed") == 1
    assert split.metrics.value(KV_TRANSFER_BYTES) == 0


def test_decode_stops_waiting_for_a_prefill_that_says_nothing() -> None:
    split = make_split()
    split.network.alter = lambda source, target, message: None if source == "prefill" else message
    split.send()
    split.network.settle()
    split.assert_right()
    assert failures(split, "timeout") == 1
    assert split.network.clock.at_s >= TRANSFER.prefill_timeout_s


@pytest.mark.parametrize("is_noticed", [True, False])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 4, 6, 9])
def test_blocks_of_a_prefill_that_started_anew_are_not_mixed_with_those_from_before(
    num_turns: int, is_noticed: bool
) -> None:
    split = make_split(kv_bytes_per_s=2e7)
    split.send("before", make_prompt(30, 1))
    for _ in range(num_turns):
        split.network.turn()
    split.network.remove("prefill")
    split.prefill_device.close()
    split.start("prefill")
    if is_noticed:
        split.decode.drop_peer("prefill")
    split.send("after", make_prompt(30, 2))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert {f"prefill/{split.epoch}"} <= {command.peer for command in read_commands(split)}


def test_a_publication_under_another_epoch_is_not_read() -> None:
    split = make_split()

    def forge(source: str, target: str, message: EngineOutput) -> EngineOutput:
        return msgspec.structs.replace(message, epoch=77) if isinstance(message, KvPublication) else message

    split.network.alter = forge
    split.send()
    split.network.settle()
    split.assert_right()
    assert read_commands(split) == []
    assert failures(split, "protocol") == 1


def test_a_prefill_engine_that_was_dropped_can_be_connected_to_again() -> None:
    split = make_split(kv_bytes_per_s=1e7, prefill_budget=64)
    split.send("r0", make_prompt(30, 1))
    split.turns_until(lambda: bool(read_commands(split)))
    split.network.disconnect("prefill", "decode")
    split.network.settle()
    split.send("r1", make_prompt(16, 2))
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    kinds = [type(command) for plan in split.decode_runner.plans for command in plan.kv]
    assert kinds.count(ConnectPeer) == 2
    assert kinds.count(DropPeer) == 1
    assert failures(split, "read_failed") == 0


@pytest.mark.parametrize("num_turns", range(14))
@pytest.mark.parametrize("speed", [SLOW, 1e10])
def test_a_client_that_leaves_at_any_time_leaves_nothing_behind(num_turns: int, speed: float) -> None:
    split = make_split(kv_bytes_per_s=speed)
    split.send("r0", make_prompt(30, 1), 20)
    split.send("r1", make_prompt(9, 2), 20)
    for _ in range(num_turns):
        split.network.turn()
    split.cancel("r0")
    split.decode.drop_peer(CLIENT)
    split.network.step("decode")
    num_heard = len(split.answer("r0").tokens), len(split.answer("r1").tokens)
    split.network.settle(max_turns=200)
    split.assert_clean()
    assert (len(split.answer("r0").tokens), len(split.answer("r1").tokens)) == num_heard


def test_a_request_that_still_waits_for_blocks_can_be_cancelled() -> None:
    split = make_split(num_decode_blocks=9, kv_bytes_per_s=SLOW)
    for number in range(3):
        split.send(f"r{number}", make_prompt(30, number))
    split.turns_until(split.has_carried(PrefillOrder))
    assert split.decode.stats().num_waiting == 2
    split.cancel("r1")
    split.network.settle()
    split.assert_right("r0", "r2")
    split.assert_clean()
    assert split.answer("r1").tokens == []


def test_blocks_of_a_cancelled_request_are_not_used_while_a_read_writes_them() -> None:
    split = make_split(kv_bytes_per_s=SLOW, prefill_budget=64, num_decode_blocks=9)
    split.send("r0", make_prompt(30, 1))
    split.turns_until(lambda: bool(read_commands(split)))
    split.cancel("r0")
    split.network.turn()
    assert split.decode.stats().blocks_by_state["arriving"] == 8
    split.decode.put(CLIENT, make_message("r1", make_prompt(30, 2), 4))
    split.prompts["r1"] = (make_prompt(30, 2), 4)
    split.network.settle()
    split.assert_right("r1")
    split.assert_clean()


def test_a_deadline_ends_a_request_that_prefill_works_on() -> None:
    split = make_split(kv_bytes_per_s=SLOW)
    message = make_message("r", 60, 5, prefill=split.prefill_address, deadline_s=0.4)
    split.decode.put(CLIENT, message)
    split.network.settle()
    assert split.answer().error_kind == "RequestTimeout"
    split.assert_clean()


def test_a_first_token_from_prefill_is_not_said_again_by_decode() -> None:
    split = make_split(kv_bytes_per_s=SLOW, prefill_budget=64)
    split.send()
    split.turns_until(lambda: bool(split.answer().tokens))
    split.network.disconnect("prefill", "decode")
    split.network.settle()
    split.assert_right()
    assert failures(split, "peer_lost") == 1


def test_cached_tokens_of_a_request_that_fell_back_are_those_found_where_it_ran() -> None:
    split = make_split()
    split.send("first", make_prompt(17), 2)
    split.network.settle()
    split.network.alter = lambda source, target, message: None
    split.send("second", make_prompt(30), 2)
    split.turns_until(lambda: split.decode.stats().num_tickets == 1)
    assert pool_of(split.decode).counts()["arriving"] == 8
    split.network.settle()
    final = split.answer("second").final
    assert final is not None
    assert final.num_cached_tokens == computed_positions(split.decode_runner)[-2][0] == 16


def test_a_first_token_does_not_wait_for_the_prompt_that_is_computed_behind_it() -> None:
    split = make_split()
    clock, told_s = split.network.clock, dict[str, float]()

    def note(source: str, target: str, message: EngineOutput) -> EngineOutput:
        if isinstance(message, KvPublication) and message.first_token is not None:
            told_s[message.first_token.request_id] = clock.at_s
        return message

    split.network.alter = note
    split.send("first", make_prompt(8, seed=1))
    split.send("second", make_prompt(32, seed=2))
    split.network.settle()
    step_s = STEP.base_s + 8 * STEP.per_prefill_token_s
    # The second prompt's first chunk is under way when the first prompt is computed.
    assert told_s["first"] < 1.5 * step_s
    assert told_s["second"] > 4 * step_s


def test_what_the_transfer_costs_behind_the_last_chunk_is_measured_on_both_sides() -> None:
    split = make_split(kv_bytes_per_s=10 * SLOW, prefill_budget=64)
    split.send()
    split.network.settle()
    exposed = split.metrics.histogram(KV_EXPOSED_S)
    published = split.prefill_metrics.histogram(KV_PUBLISH_S)
    # All eight blocks came with the last publication, and are read one after the other. A turn takes 0.05 s.
    assert (exposed.count, published.count) == (1, 1)
    assert 8 * 0.026 < exposed.sum < 8 * 0.027 + 0.05
    assert 0 <= published.sum < STEP.base_s
    split.send("one token", make_prompt(30, seed=5), max_tokens=1)
    split.network.settle()
    assert split.metrics.histogram(KV_EXPOSED_S).count == 1, "its blocks were for nothing"
    assert split.prefill_metrics.histogram(KV_PUBLISH_S).count == 2
