"""What a runner remembers between steps: tokens, drafts, page tables and sampling state of each row.

A row is filled once (`NewRow`) and then only grows: by `RowStep.new_pages` before a step, by sampled tokens after it.
Tokens stay on the model's device, so a decode step never waits for the host to learn them. A row's drafts lie behind
its tokens, where a step that verifies them finds them as its input. Behind the rows of requests there is one that
stands for none: steps of a fixed number of rows are filled up with it. Knows no model, no scheduling and no stop
conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.kv_cache.layout import CacheGroup
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, StepPlan
from atom_cluster.ops.sampling import Draw
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.runner.host_tensors import on_device
from atom_cluster.runner.page_tables import PageTable, StateTable
from atom_cluster.runner.sampling_table import SamplingTable, draw_of, is_plain
from atom_cluster.units import ceil_div


@dataclass(slots=True)
class Row:
    """The host's part of one occupied row."""

    sampling: SamplingParams
    draw: Draw
    """What it takes to choose its tokens."""
    is_plain: bool
    """Whether they follow from logits, temperature and truncation alone, and are all that is wanted."""
    num_prompt_tokens: int

    @classmethod
    def of(cls, sampling: SamplingParams, num_prompt_tokens: int) -> Row:
        """For a request with these parameters; worked out once, as every step asks."""
        return cls(sampling, draw_of(sampling), is_plain(sampling), num_prompt_tokens)


def slack(num_drafts: int) -> int:
    """Positions that two plans in flight may reach behind the last one of a context."""
    return 2 + 3 * num_drafts


class RowTable:
    """All rows of one rank.

    Device memory: `tokens`, int32 for each row and position, and what the tables of pages have.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        groups: Sequence[CacheGroup],
        num_pages: Sequence[int],
        num_drafts: int,
        device: torch.device,
    ) -> None:
        """groups: those of the model's layout, in order; each has a page more than its `num_pages`, which is spare."""
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.rows: list[Row | None] = [None] * num_rows
        self._device = device
        # More than the context: with two plans in flight a request that has just become full may run once more.
        width = max_model_len + slack(num_drafts)
        self.padding_row = num_rows
        """The row that stands for none. It has one token, 0, and spare pages."""
        num_rows += 1
        self.tokens = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        """[num_rows + 1, positions]"""
        self.num_known = torch.ones(num_rows, dtype=torch.int64, device=device)
        """[num_rows + 1]: tokens of each row, drafts not counted."""
        self.sampling = SamplingTable(num_rows=num_rows, device=device)
        """What rows ask for; of the one that stands for none, zeros."""
        sizes = {"num_rows": num_rows, "num_columns": ceil_div(width, block_size)}
        self.pages = {
            group.window: PageTable(**sizes, spare_page=count, device=device)
            for group, count in zip(groups, num_pages)
            if group.kind != "state"
        }
        """By the window of the group; None: the group that keeps everything."""
        self.states: StateTable | None = None
        if groups[-1].kind == "state":
            self.states = StateTable(
                num_rows=num_rows, pages_per_row=1 + num_drafts, spare_page=num_pages[-1], device=device
            )
        self.tensors = RowTables(
            tokens=self.tokens,
            num_known=self.num_known,
            pages=tuple(table.device for table in self.pages.values()),
            block_size=block_size,
        )
        """As ops see them."""
        self._num_groups = len(groups)
        self._num_drafts = num_drafts

    def apply(self, plan: StepPlan) -> None:
        """Bring rows up to date for `plan`: free, fill and extend them. Raises ProtocolError for a plan out of step."""
        for row in plan.freed_rows:
            self.rows[row] = None
        for new in plan.new_rows:
            self._fill(new)
        for step in plan.rows:
            self.get(step.row)
            if step.new_pages:
                self._extend(step.row, step.new_pages)
        for table in self.pages.values():
            table.flush()
        self.sampling.flush()

    def append(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write tokens [S] at `positions` [S] of `rows` [S], all int64 on the device."""
        self.tokens.index_put_((rows, positions), token_ids.to(torch.int32))

    def tokens_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens, or what lies behind them, at `positions` of `rows`; int64."""
        return self.tokens[rows, positions].to(torch.int64)

    def get(self, row: int) -> Row:
        """The state of an occupied row."""
        state = self.rows[row]
        if state is None:
            raise ProtocolError(f"the plan uses row {row}, which is empty")
        return state

    def _fill(self, new: NewRow) -> None:
        if self.rows[new.row] is not None:
            raise ProtocolError(f"request {new.request_id} got row {new.row}, which was not freed")
        if len(new.token_ids) > self.max_model_len + 1:
            raise ProtocolError(f"request {new.request_id} has {len(new.token_ids)} tokens, more than a row holds")
        sampling = new.sampling
        eos_token_ids = () if sampling.ignore_eos else new.eos_token_ids
        self.rows[new.row] = Row.of(sampling, new.num_prompt_tokens)
        self.sampling.fill(
            new.row,
            sampling,
            num_prompt_tokens=new.num_prompt_tokens,
            ending_token_ids=(*eos_token_ids, *sampling.stop_token_ids),
        )
        tokens = (*new.token_ids, *new.drafts[: self._num_drafts])
        self.tokens[new.row, : len(tokens)] = on_device(tokens, torch.int32, self._device)
        self.num_known[new.row : new.row + 1].fill_(len(new.token_ids))  # an assigned number would be waited for
        self._check_groups(new.row, new.pages)
        for table, pages in zip(self.pages.values(), new.pages):
            table.fill(new.row, pages)
        if self.states is not None:
            self.states.fill(new.row, new.pages[-1])

    def _extend(self, row: int, new_pages: tuple[tuple[int, ...], ...]) -> None:
        self._check_groups(row, new_pages)
        for table, pages in zip(self.pages.values(), new_pages):
            table.extend(row, pages)
        if self.states is not None:
            self.states.replace(row, new_pages[-1])

    def _check_groups(self, row: int, pages: tuple[tuple[int, ...], ...]) -> None:
        if len(pages) != self._num_groups:
            raise ProtocolError(f"row {row} was given pages of {len(pages)} cache groups, not of {self._num_groups}")
