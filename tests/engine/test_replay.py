"""A request that comes with output tokens goes on as the engine before would have: same tokens, same end."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.requests import EngineRequest
from atom_cluster.messages.transfer import PrefillFailed, PrefillOrder
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import (
    GENERATION_TOKENS,
    PREEMPTIONS,
    PREFIX_CACHE_HITS,
    PREFIX_CACHE_QUERIES,
    SPEC_DRAFT_TOKENS,
    TTFT_S,
)
from tests.engine.split import CLIENT, Split, make_split
from tests.factories import (
    TRANSFER,
    assert_clean,
    check_integrity,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
    states,
    window,
)
from tests.fakes import Answer, Network, RecordingRunner, VirtualClock

NUM_TOKENS = 12
PROMPT = make_prompt(30)
EXPECTED = expected_tokens(PROMPT, NUM_TOKENS)


@dataclass
class Engine:
    """One engine, fresh: nothing of the request is in its cache."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_blocks: int = 64
    max_drafts: int = 0
    other_groups: tuple[PageGroup, ...] = ()
    samples_eos: bool = False
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    network: Network = field(default_factory=lambda: Network(VirtualClock()))
    core: EngineCore = field(init=False)
    runner: RecordingRunner = field(init=False)

    def __post_init__(self) -> None:
        device = make_runner(
            self.network.clock,
            num_blocks=self.num_blocks,
            max_drafts=self.max_drafts,
            other_groups=self.other_groups,
        )
        self.runner = RecordingRunner(device, samples_eos=self.samples_eos)
        self.core = make_engine(self.network, runner=self.runner, scheduler=self.scheduler, metrics=self.metrics)
        self.network.after_step = lambda: check_integrity(self.core)

    def send(self, message: EngineRequest, emitted: list[int]) -> None:
        self.network.answers[message.request_id] = Answer(tokens=list(emitted))
        self.core.put(CLIENT, with_emitted(message, emitted))

    def ask(self, message: EngineRequest, emitted: list[int]) -> Answer:
        """The whole answer, `emitted` included."""
        self.send(message, emitted)
        self.network.settle()
        assert_clean(self.core)
        return self.network.answers[message.request_id]


def with_emitted(message: EngineRequest, emitted: list[int]) -> EngineRequest:
    return msgspec.structs.replace(message, emitted=tuple(emitted))


SPECULATING = {"max_drafts": 3}
SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "synchronous": {"scheduler": SchedulerConfig(async_scheduling=False)},
    "small chunks": {"scheduler": SchedulerConfig(max_num_batched_tokens=5)},
    "decode only": {"scheduler": SchedulerConfig(policy="decode_only")},
    "speculating": SPECULATING,
    "windows": {"other_groups": (window(5),), **SPECULATING},
    "states": {"other_groups": (states(),), **SPECULATING},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("num_emitted", range(NUM_TOKENS))
def test_an_engine_goes_on_behind_any_number_of_emitted_tokens(setting: dict[str, object], num_emitted: int) -> None:
    engine = Engine(**setting)  # type: ignore[arg-type]
    answer = engine.ask(make_message("r", PROMPT, NUM_TOKENS), EXPECTED[:num_emitted])
    assert (answer.tokens, answer.reason) == (EXPECTED, "length")
    assert engine.metrics.value(GENERATION_TOKENS) == NUM_TOKENS - num_emitted
    if setting is SPECULATING and num_emitted < NUM_TOKENS - 4:
        assert engine.metrics.value(SPEC_DRAFT_TOKENS, position="0") > 0


ENDINGS = {
    "at the end of sequence": make_message("r", PROMPT, NUM_TOKENS, eos=(EXPECTED[7],)),
    "at a stop token": make_message("r", PROMPT, NUM_TOKENS, stop_token_ids=(EXPECTED[7],)),
    "not before min_tokens": make_message("r", PROMPT, NUM_TOKENS, stop_token_ids=(EXPECTED[4],), min_tokens=9),
    "not at an ignored end": make_message("r", PROMPT, NUM_TOKENS, eos=(EXPECTED[7],), ignore_eos=True),
}


@pytest.mark.parametrize("message", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("max_drafts", [0, 3])
def test_an_output_ends_where_it_would_have_undisturbed(message: EngineRequest, max_drafts: int) -> None:
    # What the simulated device samples is no end of sequence unless it is told of none; stop tokens it may sample.
    undisturbed = Engine(max_drafts=max_drafts, samples_eos=True).ask(message, [])
    for num_emitted in range(len(undisturbed.tokens)):
        emitted = undisturbed.tokens[:num_emitted]
        answer = Engine(max_drafts=max_drafts, samples_eos=True).ask(message, emitted)
        assert (answer.tokens, answer.reason) == (undisturbed.tokens, undisturbed.reason)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (make_message("r", PROMPT, 5), "length"),
        (make_message("r", PROMPT, 9, eos=(EXPECTED[4],)), "stop"),
        (make_message("r", PROMPT, 9, stop_token_ids=(EXPECTED[4],)), "stop"),
    ],
)
def test_a_request_that_has_all_its_tokens_ends_without_a_step(message: EngineRequest, reason: str) -> None:
    engine = Engine()
    answer = engine.ask(message, EXPECTED[:5])
    assert (answer.tokens, answer.reason) == (EXPECTED[:5], reason)
    assert engine.runner.plans == []


def test_logprobs_come_with_new_tokens_only() -> None:
    engine = Engine()
    taken = []
    inner = engine.network.post

    def post(source: str, destination: object, message: object) -> None:
        taken.append(message)
        inner(source, destination, message)  # type: ignore[arg-type]

    engine.network.post = post  # type: ignore[method-assign]
    engine.ask(make_message("r", PROMPT, NUM_TOKENS, logprobs=2), EXPECTED[:5])
    deltas = [delta for message in taken for delta in getattr(message, "deltas", ())]
    assert sum(len(delta.logprobs) for delta in deltas) == sum(len(delta.token_ids) for delta in deltas) == 7
    assert deltas[0].first_index == 5


def test_what_is_cached_counts_up_to_the_prompt_and_the_first_token_was_another_engines() -> None:
    engine = Engine()
    engine.ask(make_message("before", (*PROMPT, *EXPECTED), 1), [])
    answer = engine.ask(make_message("r", PROMPT, NUM_TOKENS), EXPECTED[:10])
    assert answer.tokens == EXPECTED and answer.final is not None
    assert answer.final.num_cached_tokens == len(PROMPT)
    assert engine.metrics.value(PREFIX_CACHE_HITS) == 36
    assert engine.metrics.value(PREFIX_CACHE_QUERIES) == len(PROMPT) + NUM_TOKENS + len(PROMPT) + 10
    assert engine.metrics.histogram(TTFT_S).count == 1


def test_replayed_requests_that_are_preempted_are_right_too() -> None:
    engine = Engine(num_blocks=20)
    prompts = {f"r{number}": make_prompt(10, number) for number in range(8)}
    for number, (request_id, prompt) in enumerate(prompts.items()):
        engine.send(make_message(request_id, prompt, 30), expected_tokens(prompt, 30)[:number])
    engine.network.settle()
    assert engine.metrics.value(PREEMPTIONS) > 0
    for request_id, prompt in prompts.items():
        assert engine.network.answers[request_id].tokens == expected_tokens(prompt, 30)
    assert_clean(engine.core)


# --- with a prefill engine


def send(split: Split, num_emitted: int, *, prompt: tuple[int, ...] = PROMPT, request_id: str = "r") -> None:
    expected = expected_tokens(prompt, NUM_TOKENS)
    split.prompts[request_id] = (prompt, NUM_TOKENS)
    split.network.answers[request_id] = Answer(tokens=expected[:num_emitted])
    message = make_message(request_id, prompt, NUM_TOKENS, prefill=split.prefill_address)
    split.decode.put(CLIENT, with_emitted(message, expected[:num_emitted]))


@pytest.mark.parametrize("num_emitted", [0, 1, 2, 3, 6, 11])
@pytest.mark.parametrize("max_drafts", [0, 3])
@pytest.mark.parametrize("groups", [(), (window(5),), (states(),)], ids=["full", "windows", "states"])
def test_prefill_computes_emitted_tokens_with_the_prompt(
    num_emitted: int, max_drafts: int, groups: tuple[PageGroup, ...]
) -> None:
    split = make_split(max_drafts=max_drafts, other_groups=groups)
    send(split, num_emitted)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    (order,) = split.network.messages(PrefillOrder)
    assert isinstance(order, PrefillOrder)
    assert (order.token_ids, list(order.emitted)) == (PROMPT, EXPECTED[:num_emitted])
    steps = [row for plan in split.decode_runner.plans for row in plan.rows]
    assert not steps or steps[0].start == len(PROMPT) + num_emitted, "what prefill computed is not computed again"
    assert bool(steps) == (num_emitted < NUM_TOKENS - 1)
    assert not split.network.messages(PrefillFailed)


def test_a_short_prompt_with_much_output_is_worth_a_prefill_engine() -> None:
    split = make_split(transfer=TRANSFER.model_copy(update={"min_remote_tokens": 16}))
    send(split, 6, prompt=make_prompt(9), request_id="short")
    send(split, 7, prompt=make_prompt(9, 1), request_id="long")
    split.network.settle()
    split.assert_right()
    orders = [order.request_id for order in split.network.messages(PrefillOrder) if isinstance(order, PrefillOrder)]
    assert orders == ["long"]


@pytest.mark.parametrize("num_emitted", [1, 6])
def test_what_prefill_has_of_the_first_run_goes_out_at_once(num_emitted: int) -> None:
    split = make_split()
    split.prefill.put(CLIENT, make_message("local", (*PROMPT, *EXPECTED[:num_emitted]), 4))
    split.network.settle()
    send(split, num_emitted)
    split.network.settle()
    split.assert_right("r")
    split.assert_clean()


@pytest.mark.parametrize("num_turns", range(0, 12, 2))
def test_decode_computes_emitted_tokens_itself_when_prefill_is_lost(num_turns: int) -> None:
    split = make_split(kv_bytes_per_s=2e7)
    send(split, 6)
    for _ in range(num_turns):
        split.network.turn()
    split.network.remove("prefill")
    split.prefill_device.close()
    split.decode.drop_peer("prefill")
    split.network.settle()
    split.assert_right()
    split.assert_clean()


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 11)), min_size=1, max_size=10),
    seed=st.integers(0, 100),
    budget=st.sampled_from((5, 8, 64)),
    max_drafts=st.sampled_from((0, 2)),
)
def test_any_mixture_of_requests_goes_on_as_it_began(
    requests: list[tuple[int, int, int]], seed: int, budget: int, max_drafts: int
) -> None:
    split = make_split(seed, prefill_budget=budget, max_drafts=max_drafts)
    for number, (family, num_tokens, num_emitted) in enumerate(requests):
        prompt = (*make_prompt(num_tokens, family), number)
        send(split, num_emitted, prompt=prompt, request_id=f"r{number}")
    split.network.settle()
    split.assert_right()
    split.assert_clean()
