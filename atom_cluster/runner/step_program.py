"""StepProgram: what a step does on the device, from a layout to tokens in their rows. Issued as it is, or captured.

Nothing in here looks at a number on the device or depends on one that only the host has, but for the sizes that the
layout fixes. Shape suffixes as in `runner/step_layout.py`; D hidden dims, V vocabulary, K drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.models.protocol import CausalLM
from atom_cluster.runner.drafter import Drafter
from atom_cluster.runner.inputs import BlockTables, InputBuilder, StepInputs
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.speculation import accept, keep_states
from atom_cluster.runner.step_layout import StepLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What the model made of a step."""

    inputs: StepInputs
    hidden: torch.Tensor
    """[T, D]"""
    logits: torch.Tensor | None
    """[P, V]; None when no row samples."""


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

    def __init__(self, *, model: CausalLM, inputs: InputBuilder, table: RowTable, drafter: Drafter | None) -> None:
        self._model = model
        self._inputs = inputs
        self._table = table
        self._drafter = drafter

    def compute(self, layout: StepLayout, block_tables: BlockTables | None = None) -> Computed:
        """The model's part. block_tables: as for `InputBuilder.build`."""
        inputs = self._inputs.build(layout, block_tables)
        hidden_TD = self._model.forward(inputs.batch)
        logits_PV = None
        if layout.sampling:
            sampled_PD = hidden_TD if layout.samples_all else hidden_TD[layout.sample_index]
            logits_PV = self._model.compute_logits(sampled_PD)
        return Computed(inputs=inputs, hidden=hidden_TD, logits=logits_PV)

    def finish(self, computed: Computed, token_ids_P: torch.Tensor) -> Outcome:
        """What follows once tokens were chosen: drafts are verified, tokens written, the next drafts made."""
        inputs = computed.inputs
        num_kept_S = accept(token_ids_P, inputs, self._table)
        keep_states(inputs, num_kept_S, self._table)
        drafts_SK = None if self._drafter is None else self._drafter.draft(inputs, computed.hidden, num_kept_S)
        return Outcome(token_ids=token_ids_P, num_kept=num_kept_S, drafts=drafts_SK)
