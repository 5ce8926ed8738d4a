"""Decode steps as CUDA or HIP graphs: captured once per number of rows, then replayed with other rows.

A step of a captured size runs over memory of its own: the rows' numbers are written there before each replay, and
everything else follows from them on the device. A step of fewer rows is filled up with the row that stands for none.
All sizes share one pool of memory for what is needed in between. Knows no requests and no sampling parameters.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.messages.steps import RowStep
from atom_cluster.runner.inputs import InputBuilder
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.step_layout import StepLayout, lay_out
from atom_cluster.runner.step_program import Computed, Outcome, StepProgram
from atom_cluster.units import MiB

_log = logging.getLogger(__name__)

_NUM_WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and creates handles, which a capture must not."""
_NUM_STAGES = 8
"""Pinned buffers that take turns: more than steps can be in flight, so none is overwritten before it was read."""

Choose = Callable[[Computed], torch.Tensor]
"""What the model computed -> token ids [P], equal on all ranks, on the device alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphedStep:
    """What a replay leaves behind, in memory that the next replay overwrites."""

    layout: StepLayout
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
        device: torch.device,
    ) -> None:
        """sizes: rows of the steps to capture, ascending. choose: how tokens are chosen where that is captured too."""
        self._program = program
        self._inputs = inputs
        self._table = table
        self._sizes = list(sizes)
        self._num_drafts = num_drafts
        self._choose = choose
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self.capture_s = 0.0
        self.num_bytes = 0

    def describe(self) -> str:
        """For the start-up log: `full: 35 sizes of decode steps, 1 to 256 rows`."""
        return f"full: {len(self._sizes)} sizes of decode steps, {self._sizes[0]} to {self._sizes[-1]} rows"

    def takes(self, steps: Sequence[RowStep]) -> bool:
        """Whether a step of these rows can be replayed: every row decodes, and there are not too many."""
        return len(steps) <= self._sizes[-1] and all(
            step.samples and step.num_tokens == step.num_drafts + 1 for step in steps
        )

    def run(self, steps: Sequence[RowStep], *, chooses: bool) -> GraphedStep:
        """Issue a step that `takes` allows. chooses: with the choice of tokens and what follows from it."""
        size = self._sizes[bisect.bisect_left(self._sizes, len(steps))]
        captured = self._captured.get((size, chooses)) or self.capture(size, chooses=chooses)
        captured.write(steps, self._inputs.written_pages(steps))
        captured.graph.replay()
        return captured.step

    def capture_all(self) -> None:
        """Capture every size, the largest first, so that the others find their memory in the pool."""
        for size in reversed(self._sizes):
            self.capture(size, chooses=True)

    def capture(self, size: int, *, chooses: bool) -> _Captured:
        """Capture steps of this many rows. Waits for the device. All ranks of a gang capture in the same order."""
        started_s = time.perf_counter()
        free_before = torch.cuda.mem_get_info(self._device)[0]
        captured = _Captured(self._padding_layout(size))
        block_tables = self._inputs.new_block_tables(size, captured.layout.end_cpu[0])

        def step() -> tuple[Computed, Outcome | None]:
            computed = self._program.compute(captured.layout, block_tables)
            if not chooses:
                return computed, None
            return computed, self._program.finish(computed, self._choose(computed))

        for _ in range(_NUM_WARM_UPS):
            step()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(captured.graph, pool=self._pool):
            computed, outcome = step()
        captured.step = GraphedStep(layout=captured.layout, computed=computed, outcome=outcome)
        self._captured[size, chooses] = captured
        self.capture_s += time.perf_counter() - started_s
        self.num_bytes += max(0, free_before - torch.cuda.mem_get_info(self._device)[0])
        _log.debug("captured a step of %d rows, %.0f MiB so far", size, self.num_bytes / MiB)
        return captured

    def _padding_layout(self, size: int) -> StepLayout:
        """Of a step in which no row stands for a request; bounds are those of the longest context.

        All rows compute as many drafts as there may be, wherever fewer are to be verified.
        """
        num_tokens = 1 + self._num_drafts
        start = self._table.max_model_len - 1
        step = RowStep(self._table.padding_row, start, num_tokens, samples=True, num_drafts=self._num_drafts)
        states = self._table.states
        written = None if states is None else np.full((size, num_tokens), states.spare_page)
        return lay_out([step] * size, written, self._device)


class _Captured:
    """One captured step, and where its rows are written."""

    step: GraphedStep
    """Set by the capture."""

    def __init__(self, layout: StepLayout) -> None:
        """layout: of a step of rows that stand for none."""
        num_rows, num_written = layout.written.shape
        num_drafts = torch.zeros_like(layout.num_drafts)
        self._rows = torch.cat((layout.rows.row, num_drafts, layout.written.flatten()))
        row, num_drafts, written = self._rows.split([num_rows, num_rows, num_rows * num_written])
        self.layout = replace(
            layout,
            rows=replace(layout.rows, row=row),
            num_drafts=num_drafts,
            written=written.view(num_rows, num_written),
        )
        self.graph = torch.cuda.CUDAGraph()
        self._padding = self._rows.cpu().numpy()
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
