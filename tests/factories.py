"""Engines, schedulers and requests for tests, with small sizes and virtual time. Say only what a test is about."""

from __future__ import annotations

import random
from functools import cache

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import Outbox, StepRunner
from atom_cluster.engine.request import Request
from atom_cluster.engine.scheduler import Scheduler
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.kv_cache.block_pool import BlockPool
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, GrammarSpec, SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.observability.metrics import MetricSink, NullMetrics
from atom_cluster.structured.compiler import GrammarCompiler
from tests.fakes import Network, VirtualClock

BLOCK_SIZE = 4
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 96
NUM_BLOCKS = 64
NUM_ROWS = 8

TRANSFER = KvTransferConfig(min_remote_tokens=1, lease_s=1.0, read_timeout_s=1.0, prefill_timeout_s=2.0)


def make_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens; a longer prompt of the same seed begins with a shorter one."""
    numbers = random.Random(seed)
    return tuple(numbers.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def make_message(
    request_id: str = "r",
    prompt: tuple[int, ...] | int = 10,
    max_tokens: int = 5,
    *,
    prefill: PeerAddress | None = None,
    deadline_s: float | None = None,
    priority: int = 0,
    eos: tuple[int, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    grammar: GrammarSpec | None = None,
) -> EngineRequest:
    """A request as an ingress sends it."""
    sampling = SamplingParams(
        seed=0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        grammar=grammar,
    )
    return EngineRequest(
        request_id=request_id,
        token_ids=make_prompt(prompt) if isinstance(prompt, int) else prompt,
        sampling=sampling,
        eos_token_ids=eos,
        prefill=prefill,
        deadline_s=deadline_s,
        priority=priority,
    )


def make_request(
    number: int, num_tokens: int = 10, max_tokens: int = 5, *, priority: int = 0, ticket_id: str | None = None
) -> Request:
    """A request as a scheduler sees it, the `number`-th to arrive; every number has a prompt of its own."""
    return Request(
        request_id=f"r{number}",
        client="client",
        tokens=list(make_prompt(num_tokens, seed=number)),
        num_prompt=num_tokens,
        sampling=SamplingParams(seed=0, max_tokens=max_tokens),
        eos=frozenset(),
        priority=priority,
        arrived_s=0.0,
        order=number,
        ticket_id=ticket_id,
    )


def make_scheduler(
    config: SchedulerConfig | None = None,
    *,
    num_blocks: int = NUM_BLOCKS,
    num_rows: int = NUM_ROWS,
    other_groups: tuple[PageGroup, ...] = (),
    max_drafts: int = 0,
    metrics: MetricSink | None = None,
    clock: VirtualClock | None = None,
) -> tuple[Scheduler, BlockManager]:
    """A scheduler and its blocks."""
    blocks = BlockManager(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        seed=1,
        prefix_caching=True,
        other_groups=other_groups,
        max_drafts=max_drafts,
    )
    scheduler = Scheduler(
        config=config or SchedulerConfig(),
        blocks=blocks,
        num_rows=num_rows,
        metrics=metrics or NullMetrics(),
        clock=clock or VirtualClock(),
        max_drafts=max_drafts,
    )
    return scheduler, blocks


def make_runner(
    clock: VirtualClock,
    *,
    num_blocks: int = NUM_BLOCKS,
    num_rows: int = NUM_ROWS,
    block_size: int = BLOCK_SIZE,
    max_model_len: int = MAX_MODEL_LEN,
    kv_bytes_per_s: float = 1e10,
    other_groups: tuple[PageGroup, ...] = (),
    max_drafts: int = 0,
    draft_acceptance: float = 0.7,
    grammars: GrammarCompiler | None = None,
) -> SimulatedRunner:
    """A simulated device."""
    return SimulatedRunner(
        simulation=SimulationConfig(
            num_blocks=num_blocks,
            vocab_size=VOCAB_SIZE,
            kv_bytes_per_s=kv_bytes_per_s,
            draft_acceptance=draft_acceptance,
        ),
        other_groups=other_groups,
        max_drafts=max_drafts,
        block_size=block_size,
        max_num_requests=num_rows,
        max_model_len=max_model_len,
        grammars=grammars,
        clock=clock,
    )


def make_engine(
    network: Network,
    peer_id: str = "engine",
    *,
    runner: StepRunner | None = None,
    outbox: Outbox | None = None,
    scheduler: SchedulerConfig | None = None,
    transfer: KvTransferConfig = TRANSFER,
    metrics: MetricSink | None = None,
    prefix_caching: bool = True,
    epoch: int = 1,
) -> EngineCore:
    """An engine that is part of the network."""
    address = PeerAddress(peer_id=peer_id, endpoint=f"tcp://127.0.0.1:{epoch}", epoch=epoch)
    engine = EngineCore(
        runner=runner or make_runner(network.clock),
        outbox=outbox or network.outbox(peer_id),
        scheduler=scheduler or SchedulerConfig(),
        transfer=transfer,
        metrics=metrics or NullMetrics(),
        peer=address,
        prefix_caching=prefix_caching,
        load_period_s=0.01,
        clock=network.clock,
    )
    network.add(address, engine)
    return engine


def pool_of(engine: EngineCore) -> BlockPool:
    """An engine's blocks, for checks that no interface is needed for."""
    return engine._blocks.pool


def window(size: int, num_pages: int = NUM_BLOCKS) -> PageGroup:
    """Pages of layers with a window."""
    return PageGroup(kind="window", window=size, num_pages=num_pages)


def states(num_pages: int = NUM_BLOCKS) -> PageGroup:
    """Pages of recurrent layers."""
    return PageGroup(kind="state", window=None, num_pages=num_pages)


def check_integrity(engine: EngineCore) -> None:
    """Every page of every group is in exactly one state."""
    engine._blocks.check_integrity()


def assert_clean(engine: EngineCore) -> None:
    """Nothing is left of any request: all pages are free or cached, no ticket is open."""
    check_integrity(engine)
    status = engine.stats()
    for counts in (status.blocks_by_state, *status.other_pages_by_state.values()):
        assert counts["free"] + counts["cached"] == sum(counts.values()), counts
    assert (status.num_running, status.num_waiting, status.num_tickets) == (0, 0, 0), status


@cache
def expected_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What a simulated device says after a prompt that it has all to itself, without scheduler, cache or engine."""
    runner = make_runner(VirtualClock())
    new = NewRow(
        row=0,
        request_id="expected",
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        pages=(tuple(range(NUM_BLOCKS)),),
        sampling=SamplingParams(seed=0),
    )
    tokens: list[int] = []
    for step_id in range(num_tokens):
        start, count = (0, len(prompt)) if step_id == 0 else (len(prompt) + step_id - 1, 1)
        rows = (RowStep(0, start, count, samples=True),)
        runner.submit(StepPlan(step_id=step_id, new_rows=() if step_id else (new,), rows=rows))
        result = runner.collect()
        assert result is not None
        tokens.extend(result.sampled[0].token_ids)
    runner.close()
    return tokens
