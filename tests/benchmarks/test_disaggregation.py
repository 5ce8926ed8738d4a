from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.messages.cluster import MemberCard, RouteDecision
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import RowStep, StepPlan, StepResult
from benchmarks import disaggregation, engines
from benchmarks.disaggregation import parse_arguments
from benchmarks.disaggregation_report import Equal, Results
from benchmarks.engines import Answer, EngineProcess, FrontEnd, new_secret
from benchmarks.goodput import Promise, judge
from tests.benchmarks.test_goodput import seen
from tests.tiny_models import tiny_model_dir

TINY = ["--threads", "1", "--max-model-len", "400", "--max-num-requests", "8", "--prompts", "40", "200"]
LOAD = [
    "--rates",
    "4",
    "--num-warmup",
    "3",
    "--window-s",
    "1",
    "--drain-s",
    "4",
    "--shorten",
    "40",
    "--ttft-s",
    "30",
    "--itl-s",
    "5",
]


def test_two_tiny_engines_are_compared_and_the_results_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    model = str(tiny_model_dir("llama"))
    assert disaggregation.main(["--model", model, *TINY, *LOAD, "--repeats", "2", "--save"]) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert [row["num_prompt_tokens"] for row in record["exposed"]] == [40, 200]
    for row in record["exposed"]:
        assert row["num_handed_over"] == 2
        assert row["num_bytes"] > 0
        assert 0 < row["publish_ms"] < row["ttft_ms"]
        assert row["read_ms"] > 0
    # Three lengths, greedy and sampled; on CPUs the same steps give the same bits.
    assert record["equal"] == {
        "num_requests": 6,
        "num_equal": 6,
        "largest_logprob_difference": 0.0,
        "num_handed_over": 6,
    }
    for layout in ("disaggregated", "unified"):
        (row,) = record[f"goodput_{layout}"]
        assert (row["num_requests"], row["num_good"], row["errors"]) == (4, 4, {})
        assert sum(row["places"].values()) == 4
    assert record["comparison"]["ratio"] == pytest.approx(1.0)
    assert "ratio=1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_equal", "difference", "num_handed_over", "is_right"),
    [(6, 0.0, 6, True), (5, 0.0, 6, False), (6, 1e-6, 6, False), (6, 0.0, 0, False)],
)
def test_outputs_are_right_if_all_are_equal_and_came_through_both_engines(
    num_equal: int, difference: float, num_handed_over: int, is_right: bool
) -> None:
    found = Equal(
        num_requests=6,
        num_equal=num_equal,
        largest_logprob_difference=difference,
        num_handed_over=num_handed_over,
    )
    assert found.is_right is is_right


def test_ratios_are_of_the_best_rates_and_of_each_rate() -> None:
    results = Results(label="x", is_saved=False, details={})
    for layout, counts in {"disaggregated": (4, 2), "unified": (2, 4)}.items():
        results.goodputs[layout] = [
            judge([seen([0.1])] * count + [seen([])] * (4 - count), window_s=1.0, promise=Promise()) for count in counts
        ]
    results.compare()
    comparison = results.details["comparison"]
    assert comparison["best_per_s"] == {"disaggregated": 4.0, "unified": 4.0}
    assert (comparison["ratio"], comparison["ratio_by_rate"], comparison["ratio_by_p99"]) == (1.0, [2.0, 0.5], 1.0)


def test_an_engine_that_cannot_start_says_why() -> None:
    args = parse_arguments(["--model", "x", *TINY, "--transport", "ipc"])
    options = disaggregation.runner_options(args, tiny_model_dir("llama"), 0, new_secret())
    engine = EngineProcess("engine", options)
    try:
        with pytest.raises(RuntimeError, match="engine: .*TransferError"):
            engine.wait()
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    args = parse_arguments(["--model", "x", *TINY])
    engine = EngineProcess("engine", disaggregation.runner_options(args, tiny_model_dir("llama"), 0, SECRET))
    engine.wait()
    yield engine
    engine.close()


SECRET = new_secret()
SETTINGS = EngineHostSettings(peer_id="e", role="unified", model="tiny", secret=SECRET, transfer=KvTransferConfig())
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=4, ignore_eos=True)


async def ask(card: MemberCard, sampling: SamplingParams = GREEDY, *, cut_after_s: float | None = None) -> Answer:
    front = FrontEnd([card], secret=SECRET, transfer=KvTransferConfig())
    await front.start()
    try:
        if cut_after_s is not None:
            asyncio.get_running_loop().call_later(cut_after_s, front.cut)
        return await front.generate((5, 6, 7), sampling)
    finally:
        await front.close()


def test_an_engine_keeps_its_model_when_its_role_changes(engine: EngineProcess) -> None:
    first = engine.serve(SETTINGS)
    answers = [asyncio.run(ask(first)), asyncio.run(ask(engine.serve(SETTINGS)))]
    assert answers[0].token_ids == answers[1].token_ids
    assert [answer.record.num_output_tokens for answer in answers] == [4, 4]
    assert engine.numbers()["atom_generation_tokens_total"] == 4.0
    assert engine.serve(SETTINGS).address.epoch != first.address.epoch


def test_what_an_engine_left_in_flight_is_not_the_next_ones() -> None:
    flying: list[StepPlan] = []
    runner = SimpleNamespace(
        info=None,
        poll_kv=list,
        submit=flying.append,
        collect=lambda timeout_s: StepResult(step_id=flying.pop(0).step_id, run_s=0.5) if flying else None,
    )
    kept = engines._Kept(runner)  # type: ignore[arg-type]
    for step_id in range(3):
        kept.submit(StepPlan(step_id=step_id, rows=(RowStep(0, 0, 1, True), RowStep(1, 0, 7 * step_id, True))))
    assert kept.collect(0.0) == StepResult(step_id=0, run_s=0.5)
    kept.settle()
    assert flying == []
    assert kept.collect(0.0) is None
    assert kept.take_steps() == [engines.TimedStep(0.5, 2, 1 + 7 * step_id, 0) for step_id in range(3)]
    assert kept.take_steps() == []


def test_rows_that_an_engine_left_taken_are_free_for_the_next_one(engine: EngineProcess) -> None:
    first = engine.serve(SETTINGS)
    long = SamplingParams(temperature=0.0, seed=0, max_tokens=390, ignore_eos=True)

    async def leave_in_the_middle() -> None:
        front = FrontEnd([first], secret=SECRET, transfer=KvTransferConfig())
        await front.start()
        asking = asyncio.create_task(front.generate((5, 6, 7), long))
        while not engine.steps():
            await asyncio.sleep(0.005)
        second = engine.serve(SETTINGS)
        asking.cancel()
        await front.close()
        answer = await ask(second)
        assert answer.record.error is None
        assert answer.record.num_output_tokens == 4

    asyncio.run(leave_in_the_middle())


def test_steps_are_told_by_kind_and_the_longest_one_by_one() -> None:
    steps = [
        *[engines.TimedStep(0.01, 8, 8, 0)] * 20,
        engines.TimedStep(0.1, 9, 520, 1),
        engines.TimedStep(0.2, 2, 900, 3),
    ]
    told = disaggregation._told(steps)
    assert told["decode"] == {"steps": 20, "ms": 10.0, "rows": 8.0, "tokens": 8.0}
    assert told["both"] == {"steps": 1, "ms": 100.0, "rows": 9.0, "tokens": 520.0}
    assert told["prompts"] == {"steps": 1, "ms": 200.0, "rows": 2.0, "tokens": 900.0}
    assert told["longest"][:3] == [(200.0, 2, 900), (100.0, 9, 520), (10.0, 8, 8)]  # type: ignore[index]


def test_a_request_that_is_cut_has_what_came_so_far_and_ends_at_the_engine(engine: EngineProcess) -> None:
    card = engine.serve(SETTINGS)
    answer = asyncio.run(
        ask(card, SamplingParams(temperature=0.0, seed=0, max_tokens=390, ignore_eos=True), cut_after_s=0.1)
    )
    assert answer.is_cut
    assert answer.record.error is None
    assert 0 < len(answer.token_ids) < 390


def test_errors_of_an_engine_are_in_the_record(engine: EngineProcess) -> None:
    answer = asyncio.run(ask(engine.serve(SETTINGS), SamplingParams(temperature=-1.0, seed=0, max_tokens=4)))
    assert "temperature" in (answer.record.error or "")


async def test_without_an_engine_that_decodes_nothing_is_sent(engine: EngineProcess) -> None:
    card = await asyncio.to_thread(engine.serve, dataclasses.replace(SETTINGS, role="prefill"))
    front = FrontEnd([card], secret=SECRET, transfer=KvTransferConfig())
    await front.start()
    try:
        answer = await front.generate(
            (5, 6, 7), GREEDY, decision=RouteDecision(query_id=1, decode=None, reason="no_engine")
        )
    finally:
        await front.close()
    assert answer.record.error == "no_engine"
