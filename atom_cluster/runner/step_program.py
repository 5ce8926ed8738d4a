"""StepProgram: what a step does on the device, from a layout to tokens in their rows. Issued as it is, or captured.

Nothing in here looks at a number on the device or depends on one that only the host has, but for the sizes that the
layout fixes. Shape suffixes as in `runner/step_layout.py`; D hidden dims, V vocabulary, K drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from atom_cluster.layers.logits import Logits
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.sampling import Draw
from atom_cluster.ops.table import OpTable
from atom_cluster.runner.capture import without_owning
from atom_cluster.runner.drafter import Drafter
from atom_cluster.runner.inputs import BlockTables, InputBuilder, StepInputs
from atom_cluster.runner.pieces import PiecewiseForward
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.speculation import accept, keep_states
from atom_cluster.runner.step_layout import StepLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What the model made of a step."""

    inputs: StepInputs
    hidden: torch.Tensor
    """[T, D]"""
    logits: Logits | None
    """Of P samples; None when no row samples."""

    def without_owning(self) -> Computed:
        """The same, for graphs that were captured already: memory of hidden states and logits is others' to reuse."""
        logits = self.logits
        if logits is not None:
            logits = replace(logits, part=without_owning(logits.part))
        return replace(self, hidden=without_owning(self.hidden), logits=logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step's rows got."""

    token_ids: torch.Tensor
    """[P] int64"""
    num_kept: torch.Tensor
    """[S] int64: drafts"""
    drafts: torch.Tensor | None
    """[S, K] int64"""


class StepProgram:
    """One rank's steps on the device. Borrows everything."""

    def __init__(
        self, *, model: CausalLM, inputs: InputBuilder, table: RowTable, ops: OpTable, drafter: Drafter | None
    ) -> None:
        self._model = model
        self._ops = ops
        self._inputs = inputs
        self._table = table
        self._drafter = drafter

    def compute(
        self, layout: StepLayout, block_tables: BlockTables | None = None, pieces: PiecewiseForward | None = None
    ) -> Computed:
        """The model's part. block_tables: as for `InputBuilder.build`; pieces: replayed if the step is small enough."""
        inputs = self._inputs.build(layout, block_tables)
        if pieces is not None and pieces.takes(layout.rows.num_tokens):
            hidden_TD = pieces.forward(inputs.batch)
        else:
            hidden_TD = self._model.forward(inputs.batch)
        logits = None
        if layout.sampling:
            sampled_PD = hidden_TD if layout.samples_all else hidden_TD[layout.sample_index]
            logits = self._model.compute_logits(sampled_PD)
        return Computed(inputs=inputs, hidden=hidden_TD, logits=logits)

    def finish(self, computed: Computed, token_ids_P: torch.Tensor, draw: Draw) -> Outcome:
        """What follows once tokens were chosen: drafts are verified, tokens written, the next drafts made.

        draw: what it takes to choose tokens for the step's rows.
        """
        inputs = computed.inputs
        num_kept_S = accept(token_ids_P, inputs, self._table, self._ops)
        keep_states(inputs, num_kept_S, self._table)
        drafts_SK = None if self._drafter is None else self._drafter.draft(inputs, computed.hidden, num_kept_S, draw)
        return Outcome(token_ids=token_ids_P, num_kept=num_kept_S, drafts=drafts_SK)
