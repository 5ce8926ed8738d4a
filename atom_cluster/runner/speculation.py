"""Which drafts a step keeps. The rule, and why it is exact: docs/decisions/0006-speculative-verification.md.

Each position that a step verifies draws the very token that plain decoding would draw there, with the same noise. A
draft is kept as long as it and all before it are what was drawn; what was drawn behind the last kept one replaces it.
Knows no model and no sampling.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.sampling import DrawnRows
from atom_cluster.ops.table import OpTable
from atom_cluster.runner.inputs import StepInputs
from atom_cluster.runner.row_state import RowTable


def accept(token_ids_P: torch.Tensor, inputs: StepInputs, table: RowTable, ops: OpTable) -> torch.Tensor:
    """Write what was drawn to its rows, which then know the drafts they keep and one token more; kept drafts, [S].

    Tokens behind the last kept one are written too: drafts or the next tokens will replace them.
    """
    layout = inputs.layout
    rows = DrawnRows(
        row=inputs.sampling_row,
        first_sample=layout.first_sample,
        newest_position=inputs.newest_position,
        num_drafts=layout.num_drafts,
        max_drafts=layout.max_drafts,
        padding_row=table.padding_row,
    )
    return ops.accept(token_ids_P, rows, table.tensors)


def keep_states(inputs: StepInputs, num_kept_S: torch.Tensor, table: RowTable) -> None:
    """Recurrent layers left a state behind each verified position: go on from the one behind the last kept draft."""
    state = inputs.batch.state
    if state is None or table.states is None:
        return
    layout = inputs.layout
    column_R = torch.zeros_like(layout.rows.row)
    column_R[layout.step_index] = num_kept_S
    newest_R = state.write_page.gather(1, column_R[:, None])[:, 0]
    # Rows that stand for none begin anew in every step.
    is_padding_R = layout.rows.row == table.padding_row
    table.states.newest[layout.rows.row] = newest_R.masked_fill(is_padding_R, -1)
