"""Captured decode steps give what steps issued one by one do, whatever rows, drafts and samplings follow each other.

Graphs are stand-ins here; that real ones do the same is tested in test_cuda.py.
"""

from __future__ import annotations

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, SamplingParams, TokenBatch
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.runner.kv_sizing import KvSizing
from atom_cluster.runner.row_state import slack
from tests.factories import check_integrity
from tests.fakes import ListOutbox
from tests.runner.context_model import (
    BLOCK,
    GREEDY,
    MAX_MODEL_LEN,
    ContextModel,
    continuation,
    make_memory,
    make_runner,
)
from tests.runner.row_driver import RowDriver
from tests.runner.stand_in_graphs import use_stand_in_graphs
from tests.runner.test_speculation import LENGTHS, NUM_TOKENS, PARTS, SAMPLINGS, expected_outputs, prompts

PLAIN_SAMPLINGS = tuple(
    SamplingParams(temperature=1.3, top_k=30, seed=i) if i % 2 else GREEDY for i in range(len(LENGTHS))
)


@pytest.fixture(autouse=True)
def stand_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in_graphs(monkeypatch)


def make_model(parts: dict[str, object], *, max_drafts: int) -> ContextModel:
    """Rows of captured steps compute as many drafts as there may be, up to the end of the context and beyond."""
    return ContextModel(
        num_draft_layers=min(1, max_drafts),
        drafts_wrong=True,
        num_positions=MAX_MODEL_LEN + slack(max_drafts),
        **parts,  # type: ignore[arg-type]
    )


def graphed_driver(parts: dict[str, object], *, max_drafts: int, seed: int) -> RowDriver:
    model = make_model(parts, max_drafts=max_drafts)
    return RowDriver(model, max_drafts=max_drafts, seed=seed, graph_sizes=(1, 3))


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("max_drafts", [0, 1, 3])
def test_captured_steps_follow_the_model(parts: dict[str, object], max_drafts: int) -> None:
    driver = graphed_driver(parts, max_drafts=max_drafts, seed=max_drafts)
    assert driver.runner.capture_graphs() == {}
    assert driver.run(prompts(1), NUM_TOKENS) == expected_outputs(1, parts)
    assert not max_drafts or {one.num_kept for one in driver.verified} == set(range(max_drafts + 1))


@pytest.mark.parametrize("samplings", [PLAIN_SAMPLINGS, SAMPLINGS], ids=["plain", "adjusted"])
@pytest.mark.parametrize("max_drafts", [0, 2])
@pytest.mark.parametrize("captures_at_start", [True, False])
def test_what_is_captured_in_between_leaves_rows_alone(
    samplings: tuple[SamplingParams, ...], max_drafts: int, captures_at_start: bool
) -> None:
    plain = RowDriver(ContextModel(**PARTS[3]), seed=1)  # type: ignore[arg-type]
    expected = plain.run(prompts(2), NUM_TOKENS, samplings=samplings)
    driver = graphed_driver(PARTS[3], max_drafts=max_drafts, seed=2)
    if captures_at_start:
        driver.runner.capture_graphs()
    assert driver.run(prompts(2), NUM_TOKENS, samplings=samplings) == expected


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("max_drafts", [0, 1, 3])
@pytest.mark.parametrize(("num_blocks", "budget"), [(60, 64), (14, 16)], ids=["roomy", "preempting"])
def test_an_engine_with_two_plans_in_flight_follows_the_model_to_the_end_of_the_context(
    parts: dict[str, object], max_drafts: int, num_blocks: int, budget: int
) -> None:
    model = make_model(parts, max_drafts=max_drafts)
    sizing = KvSizing(
        layout=model.kv_layout,
        block_size=BLOCK,
        max_num_requests=3,
        max_num_batched_tokens=budget,
        num_drafts=max_drafts,
    )
    memory = make_memory(model, sizing.pages(num_blocks))
    for region in memory.regions:
        region.blocks.fill_(0x47)  # finite in any dtype, and nothing that a model would have written
    runner = LocalRunner(make_runner(model=model, num_rows=3, memory=memory, max_drafts=max_drafts, graph_sizes=(1, 3)))
    outbox = ListOutbox()
    engine = EngineCore(
        runner=runner,
        outbox=outbox,
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_requests=3),
        transfer=KvTransferConfig(),
        metrics=NullMetrics(),
        peer=PeerAddress(peer_id="engine", endpoint="tcp://127.0.0.1:1", epoch=1),
    )
    common = prompts(0)[-1]
    asked = {str(i): (common[: 3 * i] + prompt)[: MAX_MODEL_LEN - 1] for i, prompt in enumerate(prompts(1))}
    for request_id, prompt in asked.items():
        sampling = SamplingParams(temperature=0.0, seed=0, ignore_eos=True)
        engine.put("client", EngineRequest(request_id=request_id, token_ids=tuple(prompt), sampling=sampling))
    while engine.step():
        pass
    found: dict[str, list[int]] = {request_id: [] for request_id in asked}
    for _, message in outbox.sent:
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                found[delta.request_id] += delta.token_ids
    assert found == {
        request_id: continuation(prompt, MAX_MODEL_LEN - len(prompt), **parts)  # type: ignore[arg-type]
        for request_id, prompt in asked.items()
    }
    check_integrity(engine)
    runner.close()


def test_a_result_says_whether_its_step_was_a_graph() -> None:
    runner = make_runner(graph_sizes=(1, 2))
    new_rows = tuple(
        NewRow(row=row, request_id="", token_ids=(5, 6), num_prompt_tokens=2, pages=((row,),), sampling=GREEDY)
        for row in range(3)
    )
    prompts = StepPlan(step_id=0, new_rows=new_rows, rows=tuple(RowStep(row, 0, 2, samples=True) for row in range(3)))
    two, three = (tuple(RowStep(row, 2, 1, samples=True) for row in range(count)) for count in (2, 3))
    plans = [prompts, StepPlan(step_id=1, rows=two), StepPlan(step_id=2, rows=three)]
    assert [runner.run(plan).execution for plan in plans] == ["eager", "graph", "eager"]
