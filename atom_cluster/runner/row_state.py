"""What a runner remembers between steps: tokens, block table and sampling state of each row.

A row is filled once (`NewRow`) and then only grows: by `RowStep.new_pages` before a step, by the sampled token
after it. Tokens stay on the model's device, so a decode step never waits for the host to learn them. Knows no model, no
scheduling and no stop conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, StepPlan
from atom_cluster.runner.host_tensors import on_device, send
from atom_cluster.units import ceil_div


@dataclass(slots=True)
class Row:
    """The host's part of one occupied row."""

    sampling: SamplingParams
    seed: int
    num_prompt_tokens: int
    ending_token_ids: tuple[int, ...]
    """Tokens that would end the request; not sampled before `sampling.min_tokens`."""
    num_blocks: int = 0


class RowTable:
    """All rows of one rank.

    Device memory: `tokens` [num_rows, max_model_len + 1] int32 and `block_table` [num_rows, max blocks] int32, the
    latter also on the host as `block_table_cpu`. On CPUs both are the same memory, and untouched rows cost nothing.
    """

    def __init__(self, *, num_rows: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.rows: list[Row | None] = [None] * num_rows
        self._device = device
        # One more than the context: with two plans in flight a request that has just become full may run once more.
        self.tokens = torch.zeros(num_rows, max_model_len + 1, dtype=torch.int32, device=device)
        max_blocks = ceil_div(max_model_len + 1, block_size)
        self._host_block_table = torch.zeros(num_rows, max_blocks, dtype=torch.int32)
        self.block_table_cpu: npt.NDArray[np.int32] = self._host_block_table.numpy()
        self.block_table = self._host_block_table.to(device)

    def apply(self, plan: StepPlan) -> None:
        """Bring rows up to date for `plan`: free, fill and extend them. Raises ProtocolError for a plan out of step."""
        for row in plan.freed_rows:
            self.rows[row] = None
        for new in plan.new_rows:
            self._fill(new)
        grown: list[tuple[int, int, int]] = []
        for step in plan.rows:
            self.get(step.row)
            if step.new_pages:
                grown += self._append_blocks(step.row, step.new_pages[0])
        if grown and self._device.type != "cpu":
            index = on_device(grown, torch.int32, self._device).unbind(1)
            self.block_table.index_put_((index[0], index[1]), index[2])

    def append(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write sampled tokens [S] at `positions` [S] of `rows` [S], all int64 on the device."""
        self.tokens.index_put_((rows, positions), token_ids.to(torch.int32))

    def get(self, row: int) -> Row:
        """The state of an occupied row."""
        state = self.rows[row]
        if state is None:
            raise ProtocolError(f"the plan uses row {row}, which is empty")
        return state

    def _fill(self, new: NewRow) -> None:
        if self.rows[new.row] is not None:
            raise ProtocolError(f"request {new.request_id} got row {new.row}, which was not freed")
        if len(new.token_ids) > self.tokens.shape[1]:
            raise ProtocolError(f"request {new.request_id} has {len(new.token_ids)} tokens, more than a row holds")
        sampling = new.sampling
        eos_token_ids = () if sampling.ignore_eos else new.eos_token_ids
        self.rows[new.row] = Row(
            sampling=sampling,
            seed=sampling.seed or 0,
            num_prompt_tokens=new.num_prompt_tokens,
            ending_token_ids=(*eos_token_ids, *sampling.stop_token_ids),
        )
        self.block_table_cpu[new.row] = 0
        self.tokens[new.row, : len(new.token_ids)] = on_device(new.token_ids, torch.int32, self._device)
        self._append_blocks(new.row, new.pages[0])
        if self._device.type != "cpu":
            self.block_table[new.row] = send(self._host_block_table[new.row].clone(), self._device)

    def _append_blocks(self, row: int, block_ids: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Extend the host's table; returns (row, column, block id) of each new entry."""
        state = self.get(row)
        first, last = state.num_blocks, state.num_blocks + len(block_ids)
        if last > self.block_table_cpu.shape[1]:
            raise ProtocolError(f"row {row} was given {last} blocks, more than its context needs")
        self.block_table_cpu[row, first:last] = block_ids
        state.num_blocks = last
        return [(row, first + i, block_id) for i, block_id in enumerate(block_ids)]
