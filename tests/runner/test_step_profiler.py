"""Windows of one rank, recorded with the real profiler."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from atom_cluster.config.observability import ProfileConfig
from atom_cluster.errors import ConfigError
from atom_cluster.messages.profile import CloseWindow, OpenWindow, WindowWritten
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.step_profiler import StepProfiler, label_of
from tests.runner.context_model import GREEDY, ContextModel, make_runner

CPU = torch.device("cpu")


def open_window(window_id: int = 0, num_steps: int | None = None) -> OpenWindow:
    return OpenWindow(
        window_id=window_id, replica="r", time=f"t{window_id}", num_steps=num_steps, with_stack=None, record_shapes=None
    )


def written(runner: ModelRunner | StepProfiler) -> WindowWritten:
    poll = runner.poll_kv if isinstance(runner, ModelRunner) else runner.poll
    deadline_s = time.monotonic() + 60
    while not (reports := poll()):
        assert time.monotonic() < deadline_s, "no trace was written"
        time.sleep(0.005)
    ((_, report),) = [(report.rank, report.report) for report in reports]
    assert isinstance(report, WindowWritten)
    return report


def labels(file: str) -> list[str]:
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation" and "[" in event["name"]]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[ModelRunner]:
    model = ContextModel(num_draft_layers=1)
    runner = make_runner(model=model, max_drafts=1, profile=ProfileConfig(directory=str(tmp_path / "traces")))
    yield runner
    runner.close()


FIRST = StepPlan(
    step_id=0,
    new_rows=(
        NewRow(row=0, request_id="a", token_ids=(1, 2, 3), num_prompt_tokens=3, pages=((0, 1, 2),), sampling=GREEDY),
        NewRow(row=1, request_id="b", token_ids=(4,) * 6, num_prompt_tokens=6, pages=((3, 4, 5, 6),), sampling=GREEDY),
    ),
    rows=(RowStep(0, 0, 3, samples=True),),
    profile=open_window(),
)
MIXED = StepPlan(step_id=1, rows=(RowStep(0, 3, 1, samples=True), RowStep(1, 0, 6, samples=True)))
DECODE = StepPlan(step_id=2, rows=(RowStep(0, 4, 1, samples=True), RowStep(1, 6, 1, samples=True)))
STOP = StepPlan(step_id=3, profile=CloseWindow(window_id=0))


def test_a_window_has_the_steps_between_its_two_ends_with_their_labels(runner: ModelRunner, tmp_path: Path) -> None:
    for plan in (FIRST, MIXED, DECODE, STOP):
        runner.run(plan)
    report = written(runner)
    assert report.error is None
    (file,) = report.files
    assert Path(file) == tmp_path / "traces" / "r_rank0_t0.pt.trace.json.gz"
    assert labels(file) == [
        "prefill[tokens=3 rows=1 ctx=3]",
        "draft[bs=1 k=1]",
        "mixed[tokens=7 bs=1 rows=1 ctx=10]",
        "draft[bs=2 k=1]",
        "decode[bs=2 q=1 ctx=12]",
        "draft[bs=2 k=1]",
    ]
    assert [path.name for path in (tmp_path / "traces").iterdir()] == [Path(file).name]


def test_a_window_ends_by_itself_after_its_number_of_steps(tmp_path: Path) -> None:
    runner = make_runner(profile=ProfileConfig(directory=str(tmp_path)))
    runner.run(StepPlan(step_id=0, new_rows=FIRST.new_rows, rows=FIRST.rows, profile=open_window(num_steps=2)))
    runner.run(MIXED)
    runner.run(DECODE)
    (file,) = written(runner).files
    assert labels(file) == ["prefill[tokens=3 rows=1 ctx=3]", "mixed[tokens=7 bs=1 rows=1 ctx=10]"]
    runner.run(STOP)  # comes late, and nobody is told again
    assert runner.poll_kv() == []
    runner.close()


def test_a_window_that_cannot_be_opened_is_reported_and_the_steps_go_on(runner: ModelRunner) -> None:
    runner.run(FIRST)
    runner.run(StepPlan(step_id=1, rows=MIXED.rows, profile=open_window(7)))
    assert written(runner).error == "the profiler did not start: window 0 is open"
    runner.run(DECODE)
    runner.run(STOP)
    assert len(labels(written(runner).files[0])) == 6


def test_a_trace_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    directory = tmp_path / "traces"
    profiler = StepProfiler(ProfileConfig(directory=str(directory)), rank=0, device=CPU)
    directory.rmdir()
    profiler.execute(open_window())
    profiler.execute(CloseWindow(window_id=0))
    report = written(profiler)
    assert report.files == ()
    assert report.error is not None and "was not written" in report.error


def test_a_directory_that_cannot_be_written_to_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"observability\.profile\.directory: traces cannot be written"):
        StepProfiler(ProfileConfig(directory=str(tmp_path / "file" / "traces")), rank=0, device=CPU)


def test_without_a_window_nothing_is_labelled() -> None:
    profiler = StepProfiler(ProfileConfig(), rank=0, device=CPU)

    def label() -> str:
        raise AssertionError("nobody reads it")

    with profiler.around(StepPlan(step_id=0, rows=FIRST.rows)), profiler.span(label):
        assert not profiler.is_open


@pytest.mark.parametrize(
    ("rows", "label"),
    [
        ([RowStep(0, 9, 1, True), RowStep(1, 4, 1, True)], "decode[bs=2 q=1 ctx=15]"),
        ([RowStep(0, 9, 1, True), RowStep(1, 4, 3, True, num_drafts=2)], "decode[bs=2 q=3 ctx=17]"),
        ([RowStep(0, 0, 8, False), RowStep(1, 8, 4, True)], "prefill[tokens=12 rows=2 ctx=20]"),
        ([RowStep(0, 9, 1, True), RowStep(1, 0, 8, False)], "mixed[tokens=9 bs=1 rows=1 ctx=18]"),
    ],
)
def test_labels_say_what_a_step_is_and_how_large(rows: list[RowStep], label: str) -> None:
    assert label_of(rows) == label
