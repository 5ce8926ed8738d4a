"""A prefill and a decode engine with a network between them, for tests of what passes between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.messages.transfer import KvPublication
from atom_cluster.observability.memory import MemoryMetrics
from tests.factories import (
    TRANSFER,
    assert_clean,
    check_integrity,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
)
from tests.fakes import Answer, Network, RecordingRunner, VirtualClock

CLIENT = "ingress"


@dataclass
class Split:
    """`prefill` computes prompts for `decode`. Small chunks, so that a prompt takes several publications."""

    network: Network
    prefill_budget: int = 8
    transfer: KvTransferConfig = TRANSFER
    kv_bytes_per_s: float = 1e10
    num_prefill_blocks: int = 64
    num_decode_blocks: int = 64
    prefill_policy: SchedulerConfig | None = None
    other_groups: tuple[PageGroup, ...] = ()
    max_drafts: int = 0
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    """Of the decode engine."""
    prefill_metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    prompts: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.network.after_step = self.check_integrity
        self.start("prefill")
        self.start("decode")

    def start(self, name: str) -> None:
        """Start an engine, in place of the one before."""
        self.epoch += 1
        is_prefill = name == "prefill"
        runner = make_runner(
            self.network.clock,
            num_blocks=self.num_prefill_blocks if is_prefill else self.num_decode_blocks,
            kv_bytes_per_s=self.kv_bytes_per_s,
            other_groups=self.other_groups,
            max_drafts=self.max_drafts,
        )
        scheduler = SchedulerConfig(max_num_batched_tokens=self.prefill_budget) if is_prefill else SchedulerConfig()
        recording = RecordingRunner(runner)
        if is_prefill:
            self.prefill_device, self.prefill_runner = runner, recording
        else:
            self.decode_device, self.decode_runner = runner, recording
        make_engine(
            self.network,
            name,
            runner=recording,
            scheduler=self.prefill_policy or scheduler if is_prefill else scheduler,
            transfer=self.transfer,
            metrics=self.prefill_metrics if is_prefill else self.metrics,
            epoch=self.epoch,
        )

    prefill_device: SimulatedRunner = field(init=False)
    decode_device: SimulatedRunner = field(init=False)
    prefill_runner: RecordingRunner = field(init=False)
    decode_runner: RecordingRunner = field(init=False)

    @property
    def prefill(self) -> EngineCore:
        return self.network.engines["prefill"]

    @property
    def decode(self) -> EngineCore:
        return self.network.engines["decode"]

    @property
    def prefill_address(self) -> PeerAddress:
        return self.network.addresses["prefill"]

    def send(self, request_id: str = "r", prompt: tuple[int, ...] | int = 30, max_tokens: int = 6) -> None:
        """A client's request reaches decode, which is to let prefill compute the prompt."""
        token_ids = make_prompt(prompt) if isinstance(prompt, int) else prompt
        self.prompts[request_id] = (token_ids, max_tokens)
        message = make_message(request_id, token_ids, max_tokens, prefill=self.prefill_address)
        self.decode.put(CLIENT, message)

    def cancel(self, request_id: str = "r") -> None:
        self.decode.put(CLIENT, CancelRequest(request_id))

    def damage(self, group: int) -> None:
        """Let the first pages of a group that arrive on decode have been damaged on the way."""

        def alter(source: str, target: str, message: EngineOutput) -> EngineOutput:
            if not isinstance(message, KvPublication) or message.group != group or not message.block_ids:
                return message
            self.network.alter = lambda source, target, message: message
            (tags,) = message.tags
            return msgspec.structs.replace(message, tags=((tags[0] ^ 1, *tags[1:]),))

        self.network.alter = alter

    def answer(self, request_id: str = "r") -> Answer:
        return self.network.answers.setdefault(request_id, Answer())

    def check_integrity(self) -> None:
        for engine in self.network.engines.values():
            check_integrity(engine)

    def turns_until(self, condition: Callable[[], bool], max_turns: int = 500) -> None:
        for _ in range(max_turns):
            if condition():
                return
            self.network.turn()
        raise AssertionError("it did not happen")

    def has_carried(self, kind: type[EngineOutput], count: int = 1) -> Callable[[], bool]:
        return lambda: len(self.network.messages(kind)) >= count

    def assert_right(self, *request_ids: str) -> None:
        """The answers are what one engine alone would have said."""
        for request_id in request_ids or self.prompts:
            prompt, max_tokens = self.prompts[request_id]
            answer = self.answer(request_id)
            assert answer.reason == "length", f"{request_id}: {answer}"
            assert answer.tokens == expected_tokens(prompt, max_tokens), request_id

    def assert_clean(self) -> None:
        for engine in self.network.engines.values():
            assert_clean(engine)


def make_split(seed: int = 0, **values: object) -> Split:
    """Both engines, with the network's random order given by the seed."""
    return Split(network=Network(VirtualClock(), seed), **values)  # type: ignore[arg-type]
