"""StepLayout + rows -> the tensors of one forward pass. All on the device, so that graphs can hold it.

Knows no model and no sampling. Shape suffixes as in `layers/forward_batch.py` and `runner/step_layout.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, LayerCache, StateMetadata
from atom_cluster.messages.steps import RowStep, StepPlan
from atom_cluster.ops.step_inputs import PlacedTokens, PlaceTokens, StepRows
from atom_cluster.runner.page_tables import whole_lines
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.step_layout import SamplingStep, StepLayout, lay_out
from atom_cluster.units import ceil_div

__all__ = ["InputBuilder", "SamplingStep", "StepInputs"]

BlockTables = tuple[torch.Tensor, ...]
"""Per group of pages, [R, columns] int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """A forward pass and where the tokens that it samples go. Tensors are int64 on the device."""

    layout: StepLayout
    batch: ForwardBatch
    token_row: torch.Tensor
    """[T]: row of each token."""
    sample_row: torch.Tensor
    """[P]: row of each sample."""
    sample_position: torch.Tensor
    """[P]: position that each sampled token will have in its row, if it is kept."""
    sampling_row: torch.Tensor
    """[S]: row of each row that samples."""
    newest_position: torch.Tensor
    """[S]: of its newest token before the drafts that the step verifies."""


class InputBuilder:
    """Builds the inputs of one rank's steps."""

    def __init__(
        self, *, table: RowTable, kv: tuple[LayerCache, ...], place: PlaceTokens, device: torch.device
    ) -> None:
        self._table = table
        self._kv = kv
        self._place = place
        self._device = device

    def lay_out(self, plan: StepPlan) -> StepLayout:
        """The host's part of a plan with at least one row; `table` must have been brought up to date for it."""
        num_pages = 1 if all(step.num_drafts == 0 for step in plan.rows) else None
        return lay_out(plan.rows, self.written_pages(plan.rows, num_pages), self._device)

    def written_pages(self, steps: Sequence[RowStep], num_pages: int | None = None) -> npt.NDArray[np.int64] | None:
        """[R, W] pages that states go to, the first `num_pages` of each row or all; None for a model without."""
        states = self._table.states
        if states is None:
            return None
        rows_R = np.array([step.row for step in steps])
        written: npt.NDArray[np.int64] = states.written[rows_R, :num_pages]
        if written.min() < 0:
            raise ProtocolError(f"row {int(rows_R[written.min(axis=1).argmin()])} has no pages for its states")
        return written

    def build(self, layout: StepLayout, block_tables: BlockTables | None = None) -> StepInputs:
        """The tensors. block_tables: where to leave each row's pages, wide enough for any context; None: new ones."""
        placed, attention = self._place_rows(
            layout.rows,
            num_decode_rows=layout.num_decode_rows,
            query_start_cpu=layout.query_start_cpu,
            end_cpu=layout.end_cpu,
            block_tables=block_tables,
        )
        sample_row, newest, sampling_row = placed.token_row, placed.positions, layout.rows.row
        if not layout.samples_all:
            sample_row, newest = sample_row[layout.sample_index], newest[layout.sample_index]
            sampling_row = sampling_row[layout.step_index]
        return StepInputs(
            layout=layout,
            batch=ForwardBatch(
                token_ids=placed.token_ids,
                positions=placed.positions,
                attention=attention,
                caches=self._kv,
                sample_index=layout.sample_index,
                state=self._state(layout),
            ),
            token_row=placed.token_row,
            sample_row=sample_row,
            sample_position=newest + 1,
            sampling_row=sampling_row,
            newest_position=newest[layout.first_sample] if layout.max_drafts else newest,
        )

    def build_single(
        self, row_S: torch.Tensor, position_S: torch.Tensor, token_S: torch.Tensor, *, longest: tuple[int, ...]
    ) -> ForwardBatch:
        """A pass over one token per row, at positions that only the device knows. Not for layers with states.

        longest: per row, the most tokens that it may have.
        """
        num_rows = len(longest)
        query_start = torch.arange(num_rows + 1, dtype=torch.int32, device=self._device)
        placed, attention = self._place_rows(
            StepRows(row=row_S, start=position_S, query_start=query_start, num_tokens=num_rows),
            num_decode_rows=num_rows,
            query_start_cpu=tuple(range(num_rows + 1)),
            end_cpu=longest,
            block_tables=None,
        )
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        return ForwardBatch(
            token_ids=token_S, positions=placed.positions, attention=attention, caches=self._kv, sample_index=nothing
        )

    def new_block_tables(self, num_rows: int, num_tokens: int) -> BlockTables:
        """Tables of the pages of so many rows with up to `num_tokens` tokens."""
        shape = (num_rows, whole_lines(ceil_div(num_tokens, self._table.block_size)))
        return tuple(torch.zeros(shape, dtype=torch.int32, device=self._device) for _ in self._table.pages)

    def _place_rows(
        self,
        rows: StepRows,
        *,
        num_decode_rows: int,
        query_start_cpu: tuple[int, ...],
        end_cpu: tuple[int, ...],
        block_tables: BlockTables | None,
    ) -> tuple[PlacedTokens, dict[int | None, AttentionMetadata]]:
        """Where tokens are, and metadata by window; what does not differ between windows is shared."""
        if block_tables is None:
            block_tables = self.new_block_tables(len(end_cpu), max(end_cpu))
        placed = self._place(rows, self._table.tensors, block_tables)
        is_cpu = self._device.type == "cpu"
        attention = {
            window: AttentionMetadata(
                block_size=self._table.block_size,
                window=window,
                num_decode_rows=num_decode_rows,
                query_start=rows.query_start,
                context_len=placed.context_len,
                block_table=block_table,
                slot=slot,
                query_start_cpu=query_start_cpu,
                context_len_cpu=tuple(placed.context_len.tolist()) if is_cpu else end_cpu,
            )
            for window, block_table, slot in zip(self._table.pages, block_tables, placed.slots)
        }
        return placed, attention

    def _state(self, layout: StepLayout) -> StateMetadata | None:
        if self._table.states is None:
            return None
        return StateMetadata(
            read_page=self._table.states.newest[layout.rows.row],
            write_page=layout.written,
            keeps_all_cpu=layout.verifies_cpu,
        )
