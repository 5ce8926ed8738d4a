"""What an engine tells of its speed: what prompts add to a step, what handoffs take beyond the computing."""

from __future__ import annotations

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.scheduler import ScheduledRow
from atom_cluster.engine.speed import SpeedMeter
from atom_cluster.messages.cluster import ReplicaLoad
from atom_cluster.observability.estimates import FORGET_S
from tests.engine.split import make_split
from tests.factories import BLOCK_SIZE, make_prompt, make_request
from tests.fakes import VirtualClock


class Meter(SpeedMeter):
    """With a clock of its own."""

    def __init__(self, max_itl_s: float | None = None) -> None:
        self.clock = VirtualClock()
        config = SchedulerConfig(max_num_batched_tokens=512, max_itl_s=max_itl_s)
        super().__init__(config, block_size=BLOCK_SIZE, clock=self.clock)


def decodes(count: int) -> list[ScheduledRow]:
    return [ScheduledRow(make_request(number), 1, 1, True) for number in range(count)]


def prompt(num_tokens: int) -> ScheduledRow:
    return ScheduledRow(make_request(0, num_tokens), 1, num_tokens, True)


def test_nothing_is_known_at_first_but_the_budget() -> None:
    speed = Meter().speed(has_decoding=False)
    assert (speed.prompt_s, speed.decode_step_s, speed.handoff_s, speed.chunk_tokens) == ((), 0.0, (), 512)


def test_prompts_cost_what_they_add_to_the_rows_beside_them() -> None:
    meter = Meter()
    meter.note_step(decodes(3), 0.010)
    meter.note_step([prompt(100)], 0.050)
    meter.note_step([*decodes(3), prompt(300)], 0.060)
    speed = meter.speed(has_decoding=True)
    assert speed.prompt_s == ((100, 0.05), (300, 0.05))
    assert speed.decode_step_s == 0.01
    meter.note_step([*decodes(3), prompt(2)], 0.009)
    assert meter.speed(has_decoding=True).prompt_s[0] == (2, 0.0009)


def test_rows_with_drafts_decode() -> None:
    meter = Meter()
    meter.note_step([ScheduledRow(make_request(0), 1, 4, True, num_drafts=3)], 0.02)
    assert meter.speed(has_decoding=True).decode_step_s == 0.02


def test_steps_that_decode_are_followed_slowly() -> None:
    meter = Meter()
    meter.note_step(decodes(1), 0.01)
    meter.note_step(decodes(1), 0.09)
    assert meter.decode_step_s == pytest.approx(0.02)


def test_a_prompt_of_which_one_token_was_missing_is_a_prompt_for_an_engine_that_does_not_decode() -> None:
    meter = Meter()
    last = prompt(1)
    last.request.ticket_id = "of another engine"
    meter.note_step([last], 0.02)
    speed = meter.speed(has_decoding=False)
    assert (speed.prompt_s, speed.decode_step_s) == (((1, 0.02),), 0.0)


def test_a_prefill_engine_that_decoded_once_does_not_count_these_steps_for_ever() -> None:
    meter = Meter()
    meter.note_step(decodes(1), 0.5)
    meter.clock.sleep(FORGET_S + 1.0)
    assert meter.speed(has_decoding=False).decode_step_s == 0.0
    meter.note_step(decodes(1), 0.01)
    assert meter.decode_step_s == 0.01


def test_handoffs_beside_prompts_are_not_counted() -> None:
    meter = Meter()
    meter.clock.sleep(10.0)
    meter.note_step([prompt(100)], 0.05)
    meter.clock.sleep(0.1)
    meter.note_handoff(64, 0.3)
    assert meter.speed(has_decoding=False).handoff_s == ()
    meter.clock.sleep(0.5)
    meter.note_handoff(64, 0.3)
    meter.note_handoff(0, 0.3)
    assert meter.speed(has_decoding=False).handoff_s == ((64, 0.3),)


def test_a_step_that_may_take_so_long_has_room_for_so_many_prompt_tokens() -> None:
    meter = Meter(max_itl_s=0.05)
    assert meter.prompt_limit() is None
    meter.note_step(decodes(1), 0.01)
    meter.note_step([prompt(100)], 0.1)
    assert meter.prompt_limit() == 40
    assert meter.speed(has_decoding=True).chunk_tokens == 40
    assert meter.speed(has_decoding=False).chunk_tokens == 512
    for _ in range(50):
        meter.note_step(decodes(1), 0.08)
    assert meter.prompt_limit() == BLOCK_SIZE
    assert Meter().prompt_limit() is None


def test_steps_too_short_to_measure_leave_room_for_a_block_at_least() -> None:
    meter = Meter(max_itl_s=0.05)
    meter.note_step(decodes(1), 0.08)
    meter.note_step([prompt(4)], 0.0)
    assert meter.prompt_limit() == BLOCK_SIZE


def test_both_engines_of_a_pair_tell_the_router_what_they_measured() -> None:
    split = make_split(kv_bytes_per_s=1e8)
    for number in range(3):
        split.send(f"r{number}", make_prompt(30, seed=number))
        split.network.settle()
    split.network.clock.sleep(1.0)
    split.network.turn()
    speeds = {load.peer_id: load.speed for load in split.network.to_router if isinstance(load, ReplicaLoad)}
    assert [size for size, _ in speeds["prefill"].prompt_s] == [6, 8]
    assert all(seconds == pytest.approx(0.005, rel=0.1) for _, seconds in speeds["prefill"].prompt_s)
    assert speeds["decode"].prompt_s == () and speeds["decode"].decode_step_s == 0.005
    ((size, seconds),) = speeds["decode"].handoff_s
    assert size == 30
    reading_s = 8 * BLOCK_SIZE * 128 * 1024 / 1e8
    assert 0 < seconds < reading_s + 0.1
