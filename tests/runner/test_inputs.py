"""The tensors of one mixed step, number by number; that they lead to right tokens is tested in test_model_runner.py."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.runner.inputs import InputBuilder, StepInputs
from atom_cluster.runner.row_state import RowTable

CPU = torch.device("cpu")


@pytest.fixture
def inputs() -> StepInputs:
    """Row 2 decodes its seventh token, row 0 computes the middle of a prompt, row 1 the last token of one."""
    table = RowTable(num_rows=3, max_model_len=16, block_size=4, device=CPU)
    rows = [(2, range(20, 27), (5, 1)), (0, range(40, 50), (7, 3, 2)), (1, range(60, 65), (4, 6))]
    plan = StepPlan(
        step_id=0,
        new_rows=tuple(
            NewRow(
                row=row,
                request_id=str(row),
                token_ids=tuple(tokens),
                num_prompt_tokens=len(tokens),
                pages=(blocks,),
                sampling=SamplingParams(seed=0),
            )
            for row, tokens, blocks in rows
        ),
        rows=(RowStep(2, 6, 1, samples=True), RowStep(0, 3, 4, samples=False), RowStep(1, 4, 1, samples=True)),
    )
    table.apply(plan)
    return InputBuilder(table=table, kv=(), device=CPU).build(plan)


def test_tokens_and_positions_are_those_of_the_rows(inputs: StepInputs) -> None:
    assert inputs.batch.token_ids.tolist() == [26, 43, 44, 45, 46, 64]
    assert inputs.batch.positions.tolist() == [6, 3, 4, 5, 6, 4]


def test_slots_follow_the_block_tables(inputs: StepInputs) -> None:
    assert inputs.batch.attention[None].slot.tolist() == [1 * 4 + 2, 7 * 4 + 3, 3 * 4, 3 * 4 + 1, 3 * 4 + 2, 6 * 4]


def test_attention_metadata_describes_each_row(inputs: StepInputs) -> None:
    attention = inputs.batch.attention[None]
    assert attention.num_decode_rows == 1
    assert attention.query_start_cpu == (0, 1, 5, 6)
    assert attention.context_len_cpu == (7, 7, 5)
    assert attention.query_start.tolist() == [0, 1, 5, 6]
    assert attention.context_len.tolist() == [7, 7, 5]
    assert attention.block_table.tolist() == [[5, 1], [7, 3], [4, 6]]
    assert {attention.query_start.dtype, attention.context_len.dtype, attention.block_table.dtype} == {torch.int32}


def test_the_rows_that_sample_are_told_with_the_place_of_their_new_token(inputs: StepInputs) -> None:
    assert inputs.batch.sample_index.tolist() == [0, 5]
    assert (inputs.sampled_rows, inputs.sampled_positions) == ((2, 1), (7, 5))
    assert (inputs.row_index.tolist(), inputs.position_index.tolist()) == ([2, 1], [7, 5])
