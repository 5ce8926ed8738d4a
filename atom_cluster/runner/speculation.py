"""Which drafts a step keeps. The rule, and why it is exact: docs/decisions/0006-speculative-verification.md.

Each position that a step verifies draws the very token that plain decoding would draw there, with the same noise. A
draft is kept as long as it and all before it are what was drawn; what was drawn behind the last kept one replaces it.
Knows no model and no sampling.
"""

from __future__ import annotations

import torch

from atom_cluster.runner.inputs import StepInputs
from atom_cluster.runner.row_state import RowTable


def verify_drafts(token_ids_P: torch.Tensor, inputs: StepInputs, table: RowTable) -> torch.Tensor:
    """How many of its drafts each row keeps, [S] int64 on the device.

    token_ids_P: what was drawn at each position, not yet in `table`, which has the drafts there.
    """
    if inputs.max_drafts == 0:
        return torch.zeros_like(inputs.num_drafts)
    is_right_P = table.tokens_at(inputs.sample_row, inputs.sample_position) == token_ids_P
    index_K = torch.arange(inputs.max_drafts, device=token_ids_P.device)
    sample_SK = inputs.first_sample[:, None] + index_K
    is_right_SK = is_right_P[sample_SK.clamp(max=len(token_ids_P) - 1)]
    return count_kept(is_right_SK & (index_K < inputs.num_drafts[:, None]))


def keep_states(inputs: StepInputs, num_kept_S: torch.Tensor, table: RowTable) -> None:
    """Recurrent layers left a state behind each verified position: go on from the one behind the last kept draft."""
    state = inputs.batch.state
    if state is None or table.states is None:
        return
    column_R = torch.zeros_like(inputs.step_row)
    column_R[inputs.step_index] = num_kept_S
    table.states.newest[inputs.step_row] = state.write_page.gather(1, column_R[:, None])[:, 0]


def count_kept(is_right_SK: torch.Tensor) -> torch.Tensor:
    """Leading right ones of each row, [S] int64."""
    return is_right_SK.to(torch.int64).cumprod(dim=1).sum(dim=1)
