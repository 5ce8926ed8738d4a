"""Which drafts a step keeps. The rule, and why it is exact: docs/decisions/0006-speculative-verification.md.

Each position that a step verifies draws the very token that plain decoding would draw there, with the same noise. A
draft is kept as long as it and all before it are what was drawn; what was drawn behind the last kept one replaces it.
Knows no model and no sampling.
"""

from __future__ import annotations

import torch

from atom_cluster.runner.inputs import StepInputs
from atom_cluster.runner.row_state import RowTable


def accept(token_ids_P: torch.Tensor, inputs: StepInputs, table: RowTable) -> torch.Tensor:
    """Write what was drawn to its rows, which then know the drafts they keep and one token more; kept drafts, [S].

    Tokens behind the last kept one are written too: drafts or the next tokens will replace them.
    """
    num_kept_S = verify_drafts(token_ids_P, inputs, table)
    table.append(inputs.sample_row, inputs.sample_position, token_ids_P)
    table.set_known(inputs.sampling_row, inputs.newest_position + num_kept_S + 2)
    return num_kept_S


def verify_drafts(token_ids_P: torch.Tensor, inputs: StepInputs, table: RowTable) -> torch.Tensor:
    """How many of its drafts each row keeps, [S] int64 on the device.

    token_ids_P: what was drawn at each position, not yet in `table`, which has the drafts there.
    """
    layout = inputs.layout
    if layout.max_drafts == 0:
        return torch.zeros_like(layout.num_drafts)
    is_right_P = table.tokens_at(inputs.sample_row, inputs.sample_position) == token_ids_P
    index_K = torch.arange(layout.max_drafts, device=token_ids_P.device)
    sample_SK = layout.first_sample[:, None] + index_K
    is_right_SK = is_right_P[sample_SK.clamp(max=len(token_ids_P) - 1)]
    return count_kept(is_right_SK & (index_K < layout.num_drafts[:, None]))


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


def count_kept(is_right_SK: torch.Tensor) -> torch.Tensor:
    """Leading right ones of each row, [S] int64."""
    return is_right_SK.to(torch.int64).cumprod(dim=1).sum(dim=1)
