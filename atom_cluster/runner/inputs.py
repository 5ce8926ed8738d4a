"""StepPlan + rows -> the tensors of one forward pass. All index arithmetic is done on the host, then sent in one copy.

Token ids are the exception: they are gathered on the device, where the previous step left what it sampled. Knows no
model and no sampling. Shape suffixes as in `layers/forward_batch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, LayerCache
from atom_cluster.messages.steps import RowStep, StepPlan
from atom_cluster.runner.host_tensors import send
from atom_cluster.runner.row_state import RowTable
from atom_cluster.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """A forward pass and where the tokens that it samples go."""

    batch: ForwardBatch
    sampled_rows: tuple[int, ...]
    """Row of each sample, in plan order."""
    sampled_positions: tuple[int, ...]
    """Position that each sampled token will have in its row."""
    row_index: torch.Tensor
    """[S] int64 on the device: `sampled_rows`."""
    position_index: torch.Tensor
    """[S] int64 on the device: `sampled_positions`."""


class InputBuilder:
    """Builds the inputs of one rank's steps."""

    def __init__(self, *, table: RowTable, kv: tuple[LayerCache, ...], device: torch.device) -> None:
        self._table = table
        self._kv = kv
        self._device = device

    def build(self, plan: StepPlan) -> StepInputs:
        """Inputs of a plan with at least one row; `table` must have been brought up to date for it."""
        steps = plan.rows
        rows_R = np.array([step.row for step in steps])
        starts_R = np.array([step.start for step in steps])
        nums_R = np.array([step.num_tokens for step in steps])
        query_start = np.zeros(len(steps) + 1, dtype=np.int64)
        np.cumsum(nums_R, out=query_start[1:])
        num_tokens = int(query_start[-1])
        if num_tokens == len(steps):
            row_of_token_T, positions_T = rows_R, starts_R
        else:
            row_of_token_T = np.repeat(rows_R, nums_R)
            positions_T = np.arange(num_tokens) + np.repeat(starts_R - query_start[:-1], nums_R)
        sampled = [i for i, step in enumerate(steps) if step.samples]
        sampled_rows = tuple(steps[i].row for i in sampled)
        sampled_positions = tuple(steps[i].start + steps[i].num_tokens for i in sampled)
        on_device = self._upload(
            rows_R,
            starts_R + nums_R,
            query_start,
            row_of_token_T,
            positions_T,
            self._slots(row_of_token_T, positions_T),
            query_start[1:][sampled] - 1,
            np.array(sampled_rows, dtype=np.int64),
            np.array(sampled_positions, dtype=np.int64),
        )
        rows, context_len, query_start_dev, row_of_token, positions, slot, sample_index, rows_S, positions_S = on_device
        context_len_cpu = tuple(step.start + step.num_tokens for step in steps)
        num_columns = ceil_div(max(context_len_cpu), self._table.block_size)
        attention = AttentionMetadata(
            block_size=self._table.block_size,
            num_decode_rows=_num_decode_rows(steps),
            query_start=query_start_dev.to(torch.int32),
            context_len=context_len.to(torch.int32),
            block_table=self._table.block_table[:, :num_columns][rows],
            slot=slot,
            query_start_cpu=tuple(query_start.tolist()),
            context_len_cpu=context_len_cpu,
        )
        batch = ForwardBatch(
            token_ids=self._table.tokens[row_of_token, positions].to(torch.int64),
            positions=positions,
            attention={None: attention},
            caches=self._kv,
            sample_index=sample_index,
        )
        return StepInputs(
            batch=batch,
            sampled_rows=sampled_rows,
            sampled_positions=sampled_positions,
            row_index=rows_S,
            position_index=positions_S,
        )

    def _slots(
        self, row_of_token_T: npt.NDArray[np.int64], positions_T: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        block_size = self._table.block_size
        blocks_T = self._table.block_table_cpu[row_of_token_T, positions_T // block_size].astype(np.int64)
        return blocks_T * block_size + positions_T % block_size

    def _upload(self, *arrays: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """The arrays on the device, int64; on GPUs one asynchronous copy of all of them together."""
        if self._device.type == "cpu":
            return tuple(torch.from_numpy(array) for array in arrays)
        packed = send(torch.from_numpy(np.concatenate(arrays)), self._device)
        return torch.split(packed, [len(array) for array in arrays])


def _num_decode_rows(steps: tuple[RowStep, ...]) -> int:
    """How many leading rows have exactly one query token."""
    for i, step in enumerate(steps):
        if step.num_tokens != 1:
            return i
    return len(steps)
