"""Decode steps as CUDA or HIP graphs: captured once per number of rows, then replayed with other rows.

A step of a captured size runs over memory of its own: the rows' numbers are written there before each replay, and
everything else follows from them on the device. A step of fewer rows is filled up with the row that stands for none.
All sizes share one pool of memory for what is needed in between. Knows no requests and no sampling parameters.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.messages.steps import RowStep
from atom_cluster.ops.sampling import Draw
from atom_cluster.runner.capture import capture_stream, captured
from atom_cluster.runner.inputs import InputBuilder
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.step_layout import StepLayout, lay_out
from atom_cluster.runner.step_program import Computed, Outcome, StepProgram

T = TypeVar("T")

_NUM_STAGES = 8
"""Pinned buffers that take turns: more than steps can be in flight, so none is overwritten before it was read."""

Choose = Callable[[Computed, Draw], torch.Tensor]
"""What the model computed -> token ids [P], equal on all ranks, on the device alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphedStep:
    """What a replay leaves behind, in memory that the next replay overwrites."""

    layout: StepLayout
    """Its first rows are those of the step; the others stand for none."""
    computed: Computed
    outcome: Outcome | None
    """None: tokens are still to be chosen from `computed`."""


class StepGraphs:
    """The captured steps of one rank. Borrows the program and the table."""

    def __init__(
        self,
        *,
        program: StepProgram,
        inputs: InputBuilder,
        table: RowTable,
        sizes: Sequence[int],
        num_drafts: int,
        choose: Choose,
        pool: Any,
        device: torch.device,
    ) -> None:
        """sizes: rows of the steps to capture, ascending. choose: how tokens are chosen where that is captured too.

        pool: memory of graphs, shared with others.
        """
        self._program = program
        self._inputs = inputs
        self._table = table
        self._sizes = list(sizes)
        self._num_drafts = num_drafts
        self._choose = choose
        self._device = device
        self._pool = pool
        self._captured: dict[int, _Captured] = {}
        self.capture_s = 0.0

    @property
    def num_captured(self) -> int:
        """Sizes captured so far."""
        return len(self._captured)

    def describe(self) -> str:
        """For the start-up log: `full: 35 sizes of decode steps, 1 to 256 rows`."""
        return f"full: {len(self._sizes)} sizes of decode steps, {self._sizes[0]} to {self._sizes[-1]} rows"

    def takes(self, steps: Sequence[RowStep]) -> bool:
        """Whether a step of these rows can be replayed: every row decodes, and there are not too many."""
        return len(steps) <= self._sizes[-1] and all(
            step.samples and step.num_tokens == step.num_drafts + 1 for step in steps
        )

    def run(self, steps: Sequence[RowStep], draw: Draw | None) -> GraphedStep:
        """Issue a step that `takes` allows. draw: how tokens are chosen; None leaves that, and what follows, to the
        caller."""
        size = self._sizes[bisect.bisect_left(self._sizes, len(steps))]
        step = self._captured.get(size)
        if step is None:
            with capture_stream(self._device):
                step = self._capture(size)
        step.write(steps, self._inputs.written_pages(steps))
        step.graph.replay()
        if draw is None:
            return GraphedStep(layout=step.layout, computed=step.computed, outcome=None)
        # What can truncate costs a greedy row of the same batch little: one graph for all that is not greedy alone.
        choice = step.choices[draw if draw is Draw.GREEDY else Draw.TRUNCATED]
        choice.graph.replay()
        return GraphedStep(layout=step.layout, computed=step.computed, outcome=choice.outcome)

    def capture_all(self) -> None:
        """Capture every size, the largest first, so that the others find their memory in the pool."""
        started_s = time.perf_counter()
        with capture_stream(self._device):
            for size in reversed(self._sizes):
                self._capture(size)
        self.capture_s = time.perf_counter() - started_s

    def _capture(self, size: int) -> _Captured:
        """Capture steps of this many rows, within `capture_stream`. All ranks of a gang capture in the same order.

        All of a step at once, while its rows stand for none: what is captured runs before, and writes to its rows.
        """
        step = _Captured(self._padding_layout(size))
        block_tables = self._inputs.new_block_tables(size, step.layout.end_cpu[0])
        computed = self._record(step.graph, lambda: self._program.compute(step.layout, block_tables))
        step.graph.replay()  # logits to choose from: garbage would do, but for numbers that are none
        for draw in (Draw.GREEDY, Draw.TRUNCATED):
            step.choices[draw] = self._capture_choice(computed, draw)
        # All that reads logits is captured: other sizes may use their memory.
        step.computed = computed.without_owning()
        self._captured[size] = step
        return step

    def _capture_choice(self, computed: Computed, draw: Draw) -> _Choice:
        """Capture what comes behind the model's part."""
        graph = torch.cuda.CUDAGraph()
        outcome = self._record(graph, lambda: self._program.finish(computed, self._choose(computed, draw), draw))
        return _Choice(graph, outcome)

    def _record(self, graph: torch.cuda.CUDAGraph, issue: Callable[[], T]) -> T:
        """Capture what `issue` launches, within `capture_stream`."""
        issue()  # compiles kernels and creates handles, which a capture must not
        with captured(graph, self._pool):
            return issue()

    def _padding_layout(self, size: int) -> StepLayout:
        """Of a step in which no row stands for a request; bounds are those of the longest row.

        All rows compute as many drafts as there may be, wherever fewer are to be verified. With drafts of plans in
        flight that are all kept, that reaches behind the longest context, by less than a row has room for.
        """
        num_tokens = 1 + self._num_drafts
        start = self._table.tokens.shape[1] - num_tokens
        step = RowStep(self._table.padding_row, start, num_tokens, samples=True, num_drafts=self._num_drafts)
        states = self._table.states
        written = None if states is None else np.full((size, num_tokens), states.spare_page)
        return lay_out([step] * size, written, self._device)


@dataclass(frozen=True, slots=True)
class _Choice:
    graph: torch.cuda.CUDAGraph
    outcome: Outcome


class _Captured:
    """Captured steps of one size, and where their rows are written."""

    computed: Computed
    """Set by the capture."""

    def __init__(self, layout: StepLayout) -> None:
        """layout: of a step of rows that stand for none."""
        num_rows, num_written = layout.written.shape
        num_drafts = torch.zeros_like(layout.num_drafts)
        self._rows = torch.cat((layout.rows.row, num_drafts, layout.written.flatten()))
        self.layout = replace(
            layout,
            rows=replace(layout.rows, row=self._rows[:num_rows]),
            num_drafts=self._rows[num_rows : 2 * num_rows],
            written=self._rows[2 * num_rows :].view(num_rows, num_written),
        )
        self.graph = torch.cuda.CUDAGraph()
        self.choices: dict[Draw, _Choice] = {}
        self._padding = self._rows.to("cpu", copy=True).numpy()
        self._stages = [torch.empty(len(self._padding), dtype=torch.int64, pin_memory=True) for _ in range(_NUM_STAGES)]
        self._turn = 0
        self._current: npt.NDArray[np.int64] = self._padding

    def write(self, steps: Sequence[RowStep], written: npt.NDArray[np.int64] | None) -> None:
        """Rows of the next replay; nothing is sent when they are those of the last one."""
        wanted, size = self._padding.copy(), len(self.layout.end_cpu)
        wanted[: len(steps)] = [step.row for step in steps]
        wanted[size : size + len(steps)] = [step.num_drafts for step in steps]
        if written is not None:
            wanted[2 * size : 2 * size + written.size] = written.reshape(-1)
        if np.array_equal(wanted, self._current):
            return
        self._turn = (self._turn + 1) % _NUM_STAGES
        stage = self._stages[self._turn]
        stage.numpy()[:] = wanted
        self._rows.copy_(stage, non_blocking=True)
        self._current = wanted
