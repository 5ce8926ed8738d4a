"""Drafter: what proposes tokens behind the sampled ones; and the one that uses a model's own layers for it.

Drafts need not be right, only likely: verification (runner/speculation.py) makes the output exact whatever they are.
Shape suffixes: T tokens of the step, D hidden dims, S rows that sample, V vocabulary, K drafts.
"""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.layers.logits import Logits
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.sampling import Draw
from atom_cluster.ops.table import OpTable
from atom_cluster.runner.inputs import InputBuilder, StepInputs
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import choose


class Drafter(Protocol):
    """Proposes tokens after every step. All ranks of a gang call it alike."""

    def draft(self, inputs: StepInputs, hidden_TD: torch.Tensor, num_kept_S: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Tokens proposed behind the newest one of each row that sampled, [S, K] int64, equal on all ranks.

        The row table has the sampled tokens already, and gets the drafts behind them. Steps in which no row samples
        are given too, since what drafts are made from may have to be computed for their tokens.

        hidden_TD: the model's hidden states of the step's tokens; num_kept_S: how many drafts each row just kept; draw:
        what it takes to choose tokens for the step's rows.
        """
        ...


class LayerDrafter:
    """Drafts with a model's own drafting layers (multi-token prediction); the last one goes on if more are wanted.

    Layer i sees the step's tokens with, for each, the token i + 1 behind it, and the hidden states of the layer before.
    Going on, the last layer sees its own draft and hidden state, one token per row.
    """

    def __init__(
        self,
        *,
        model: CausalLM,
        num_drafts: int,
        table: RowTable,
        builder: InputBuilder,
        ops: OpTable,
    ) -> None:
        self._model = model
        self._num_drafts = num_drafts
        self._table = table
        self._builder = builder
        self._ops = ops

    def draft(self, inputs: StepInputs, hidden_TD: torch.Tensor, num_kept_S: torch.Tensor, draw: Draw) -> torch.Tensor:
        """See `Drafter`."""
        batch, num_layers = inputs.batch, self._model.num_draft_layers
        rows = _DraftingRows(inputs, num_kept_S, self._table, draw)
        last_S = batch.sample_index[inputs.layout.first_sample + num_kept_S]
        hidden_SD = hidden_TD[last_S]
        drafts: list[torch.Tensor] = []
        for layer in range(num_layers):
            next_T = self._table.tokens_at(inputs.token_row, self._behind(batch.positions, 1 + layer))
            hidden_TD = self._model.forward_draft(layer, next_T, hidden_TD, batch)
            hidden_SD = hidden_TD[last_S]
            if inputs.layout.sampling:
                drafts.append(self._choose(layer, hidden_SD, rows, len(drafts)))
        while inputs.layout.sampling and len(drafts) < self._num_drafts:
            alone = self._one_token_each(inputs, rows, drafts[-1], len(drafts) - num_layers + 1)
            hidden_SD = self._model.forward_draft(num_layers - 1, drafts[-1], hidden_SD, alone)
            drafts.append(self._choose(num_layers - 1, hidden_SD, rows, len(drafts)))
        return torch.stack(drafts, dim=1) if drafts else batch.positions.new_empty(0, self._num_drafts)

    def _one_token_each(
        self, inputs: StepInputs, rows: _DraftingRows, token_S: torch.Tensor, num_behind: int
    ) -> ForwardBatch:
        """A pass at `num_behind` behind the last position that the step computed for good.

        Near the end of a row's context it stays at the last position: what it writes there is overwritten before it is
        read by anything but drafts.
        """
        limit = self._table.max_model_len
        longest = tuple(min(step.position + step.num_drafts + num_behind + 1, limit) for step in inputs.layout.sampling)
        position_S = (rows.position_S + num_behind).clamp(max=limit - 1)
        return self._builder.build_single(inputs.sampling_row, position_S, token_S, longest=longest)

    def _choose(self, layer: int, hidden_SD: torch.Tensor, rows: _DraftingRows, number: int) -> torch.Tensor:
        """The draft with this number, from 0, for each row; also in the table."""
        draft_S = rows.choose(self._model.compute_draft_logits(layer, hidden_SD), number, self._ops)
        self._table.append(rows.row_S, self._behind(rows.position_S, 2 + number), draft_S)
        return draft_S

    def _behind(self, positions: torch.Tensor, distance: int) -> torch.Tensor:
        """Positions so far behind; never outside of the table, whose last column no row's own tokens reach."""
        return (positions + distance).clamp(max=self._table.tokens.shape[1] - 1)


class _DraftingRows:
    """The rows to draft for, and how a draft is drawn: with the noise that verification will use for its position.

    So drafts agree with what the model draws there as often as the two distributions, under the row's temperature,
    min-p, top-k and top-p, allow.
    """

    def __init__(self, inputs: StepInputs, num_kept_S: torch.Tensor, table: RowTable, draw: Draw) -> None:
        self.row_S = inputs.sampling_row
        self.position_S = inputs.newest_position + num_kept_S
        """The last position that the step computed for good. Its sampled token lies behind it, then come drafts."""
        self._params = table.sampling.tensors
        self._draw = draw

    def choose(self, logits: Logits, number: int, ops: OpTable) -> torch.Tensor:
        """The draft with this number of each row."""
        position_S = self.position_S + (2 + number)
        return choose(logits, self.row_S, position_S, self._params, draw=self._draw, ops=ops)
