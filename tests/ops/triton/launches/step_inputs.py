"""Placing tokens of decode steps and of prompts."""

import torch

from atom_cluster.ops.step_inputs import RowTables, StepRows
from atom_cluster.ops.triton.step_inputs import place_tokens


def place(num_rows: int, num_tokens: int) -> None:
    rows = StepRows(
        row=torch.zeros(num_rows, dtype=torch.int64),
        start=torch.zeros(num_rows, dtype=torch.int64),
        query_start=torch.zeros(num_rows + 1, dtype=torch.int32),
        num_tokens=num_tokens,
    )
    tables = RowTables(
        tokens=torch.empty(8, 4096, dtype=torch.int32),
        num_known=torch.empty(8, dtype=torch.int64),
        pages=(torch.empty(8, 256, dtype=torch.int32),) * 2,
        block_size=16,
    )
    place_tokens(rows, tables, (torch.empty(num_rows, 256, dtype=torch.int32),) * 2)


LAUNCHES = {"decode": lambda: place(4, 4), "prompts": lambda: place(4, 2048)}
