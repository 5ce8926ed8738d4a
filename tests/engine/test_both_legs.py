"""However a request ends, and whatever it is doing then, both engines have their blocks back within a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from atom_cluster.messages.steps import StepResult
from atom_cluster.messages.transfer import KvPublication, PrefillOrder, ReadBlocks, TicketRelease
from tests.engine.split import CLIENT, Split, make_split
from tests.factories import assert_clean, make_engine, make_message, make_prompt, make_runner
from tests.fakes import RecordingRunner

WITHIN_S = 1.0
PROMPT = 60
MAX_TOKENS = 30
DEADLINE_S = 10.0
KV_BYTES_PER_S = 1e7
"""A block takes 0.05 s."""


class Device(RecordingRunner):
    """It can be broken: the next result is an error. Or it takes its time: a step lasts until all this has happened."""

    is_broken = False
    meanwhile: Sequence[Callable[[], None]] = ()

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        if self.is_broken:
            raise RuntimeError("the device is gone")
        if self.meanwhile:
            happens, *self.meanwhile = self.meanwhile
            happens()
            return None
        return super().collect(timeout_s)


def reads(split: Split) -> list[ReadBlocks]:
    return [command for plan in split.decode_runner.plans for command in plan.kv if isinstance(command, ReadBlocks)]


def queue_at_decode(split: Split) -> None:
    """Another request has all blocks of decode."""
    split.decode.put(CLIENT, make_message("other", make_prompt(80, 9), 16, prefill=split.prefill_address))
    split.turns_until(split.has_carried(PrefillOrder))
    split.send("r", PROMPT, MAX_TOKENS)
    split.network.step("decode")
    assert split.decode.stats().num_waiting == 1 and len(split.network.messages(PrefillOrder)) == 1


def ask_prefill(split: Split) -> None:
    """The order is on its way."""
    split.send("r", PROMPT, MAX_TOKENS)
    split.network.step("decode")
    assert split.decode.stats().num_tickets == 1 and not split.network.messages(PrefillOrder)


def compute_on_prefill(split: Split) -> None:
    split.send("r", PROMPT, MAX_TOKENS)
    split.turns_until(lambda: split.prefill.stats().num_running == 1)
    assert split.prefill.stats().blocks_by_state["running"] > 0 and not split.network.messages(KvPublication)


def read_blocks(split: Split) -> None:
    """Prefill is done, and its blocks are leased; some of them are here, some are being read."""
    split.send("r", PROMPT, MAX_TOKENS)
    split.turns_until(lambda: bool(split.answer().tokens))
    assert reads(split) and split.decode.stats().blocks_by_state["arriving"] > 0
    assert split.prefill.stats().blocks_by_state["leased"] > 0


def decode_tokens(split: Split) -> None:
    split.send("r", PROMPT, MAX_TOKENS)
    split.turns_until(lambda: len(split.answer().tokens) >= 5)
    assert split.decode.stats().num_running == 1


def finish(split: Split) -> None:
    """The client has the last token, and a step beyond it is in flight."""
    split.send("r", PROMPT, MAX_TOKENS)
    split.turns_until(lambda: split.answer().reason is not None)


PHASES = (queue_at_decode, ask_prefill, compute_on_prefill, read_blocks, decode_tokens, finish)


def cancel(split: Split) -> None:
    split.cancel("r")
    split.cancel("other")


def lose_ingress(split: Split) -> None:
    split.decode.drop_peer(CLIENT)


@pytest.fixture
def split() -> Split:
    """Both engines on devices of this kind."""
    split = make_split(num_decode_blocks=25, prefill_budget=8, kv_bytes_per_s=KV_BYTES_PER_S)
    for number, name in enumerate(("prefill", "decode")):
        is_prefill = name == "prefill"
        device = make_runner(split.network.clock, num_blocks=64 if is_prefill else 25, kv_bytes_per_s=KV_BYTES_PER_S)
        runner = Device(device)
        if is_prefill:
            split.prefill_device, split.prefill_runner = device, runner
        else:
            split.decode_device, split.decode_runner = device, runner
        make_engine(
            split.network,
            name,
            runner=runner,
            scheduler=split.prefill_policy,
            transfer=split.transfer,
            metrics=None if is_prefill else split.metrics,
            epoch=20 + number,
        )
    return split


def turn(split: Split) -> None:
    """A turn of everybody. An engine that ends with its device says so first, and refuses what is sent to it later."""
    for name in list(split.network.engines):
        step(split, name)
    split.network.deliver()
    split.network.clock.at_s += 0.01


def step(split: Split, name: str) -> None:
    try:
        split.network.step(name)
    except RuntimeError:
        split.network.deliver()
        split.network.remove(name)
        if name == "prefill":
            split.decode.drop_peer(name)


def seconds_until(split: Split, condition: Callable[[], bool]) -> float:
    began_s = split.network.clock.at_s
    for _ in range(1000):
        if condition():
            return split.network.clock.at_s - began_s
        turn(split)
    raise AssertionError("it did not happen")


def is_clean(split: Split, name: str) -> bool:
    if name not in split.network.engines:
        return True
    status = split.network.engines[name].stats()
    num_held = sum(count for state, count in status.blocks_by_state.items() if state not in ("free", "cached"))
    return not (num_held or status.num_running or status.num_waiting or status.num_tickets)


@pytest.mark.parametrize("end", [cancel, lose_ingress])
@pytest.mark.parametrize("phase", PHASES)
def test_a_request_that_nobody_wants_frees_both_sides(
    split: Split, phase: Callable[[Split], None], end: Callable[[Split], None]
) -> None:
    phase(split)
    num_tokens = len(split.answer().tokens)
    end(split)
    assert seconds_until(split, lambda: is_clean(split, "prefill") and is_clean(split, "decode")) < WITHIN_S
    split.network.settle()
    split.assert_clean()
    assert len(split.answer().tokens) == num_tokens, "nobody is told anything any more"


@pytest.mark.parametrize("is_announced", [True, False], ids=["its device fails", "it is lost"])
@pytest.mark.parametrize("phase", PHASES)
def test_decode_goes_on_alone_within_a_second_of_the_end_of_prefill(
    split: Split, phase: Callable[[Split], None], is_announced: bool
) -> None:
    phase(split)
    if is_announced:
        assert isinstance(split.prefill_runner, Device)
        split.prefill_runner.is_broken = True
    else:
        split.network.remove("prefill")
        split.decode.drop_peer("prefill")
    assert seconds_until(split, lambda: split.decode.stats().num_tickets == 0) < WITHIN_S
    seconds_until(split, lambda: is_clean(split, "decode"))
    split.assert_right("r")
    assert_clean(split.decode)


@pytest.mark.parametrize("is_announced", [True, False], ids=["its device fails", "it is lost"])
@pytest.mark.parametrize("phase", PHASES)
def test_prefill_is_free_within_a_second_of_the_end_of_decode(
    split: Split, phase: Callable[[Split], None], is_announced: bool
) -> None:
    phase(split)
    if is_announced:
        assert isinstance(split.decode_runner, Device)
        split.decode_runner.is_broken = True
        seconds_until(split, lambda: "decode" not in split.network.engines or is_clean(split, "decode"))
        if phase is not finish:
            assert split.answer("r").error_kind == "EngineLost", "the ingress is told that it must go elsewhere"
    else:
        split.network.remove("decode")
        split.prefill.drop_peer("decode")
    assert seconds_until(split, lambda: is_clean(split, "prefill")) < WITHIN_S
    assert_clean(split.prefill)


def test_prefill_lets_go_of_a_prompt_amid_a_step(split: Split) -> None:
    compute_on_prefill(split)
    (order,) = split.network.messages(PrefillOrder)
    assert isinstance(split.prefill_runner, Device)
    found: list[bool] = []
    split.prefill_runner.meanwhile = [
        lambda: split.prefill.put("decode", TicketRelease((order.ticket_id,))),
        lambda: found.append(is_clean(split, "prefill")),
    ]
    split.network.step("prefill")
    assert found == [True]
    split.cancel()
    split.network.settle()
    split.assert_clean()


def test_an_engine_lets_go_of_a_request_amid_a_step(split: Split) -> None:
    hold_decode_in_a_step(split, [split.cancel, lambda: found.append(is_clean(split, "decode"))])
    found: list[bool] = []
    split.network.step("decode")
    assert found == [True]
    split.network.settle()
    split.assert_clean()


def test_a_client_is_told_amid_a_step_that_its_time_is_over(split: Split) -> None:
    def look() -> None:
        split.network.deliver()
        found.append(split.answer().error_kind)

    found: list[str | None] = []
    hold_decode_in_a_step(split, [lambda: split.network.clock.sleep(2 * DEADLINE_S), look])
    split.network.step("decode")
    assert found == ["RequestTimeout"]
    split.network.settle()
    split.assert_clean()


def hold_decode_in_a_step(split: Split, meanwhile: Sequence[Callable[[], None]]) -> None:
    """Of a request that needs no prefill engine; this happens before the step ends."""
    message = make_message("r", make_prompt(PROMPT), MAX_TOKENS, deadline_s=DEADLINE_S)
    split.decode.put(CLIENT, message)
    split.turns_until(lambda: split.decode.stats().num_running == 1)
    assert isinstance(split.decode_runner, Device)
    split.decode_runner.meanwhile = meanwhile
