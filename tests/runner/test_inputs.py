"""The tensors of one mixed step, number by number; that they lead to right tokens is tested in test_model_runner.py."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout, StateLayerLayout, StateTensor
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.ops.torch_ref import place_tokens
from atom_cluster.runner.inputs import InputBuilder, SamplingStep, StepInputs
from atom_cluster.runner.row_state import RowTable

CPU = torch.device("cpu")
LAYOUT = KvLayout(layers=(KvLayerLayout(num_kv_heads=1, key_dim=1, value_dim=1, dtype="float32"),))


def build_inputs(table: RowTable, plan: StepPlan) -> StepInputs:
    builder = InputBuilder(table=table, kv=(), place=place_tokens, device=CPU)
    return builder.build(builder.lay_out(plan))


@pytest.fixture
def inputs() -> StepInputs:
    """Row 2 decodes its seventh token, row 0 computes the middle of a prompt, row 1 the last token of one."""
    table = RowTable(
        num_rows=3, max_model_len=16, block_size=4, groups=LAYOUT.groups, num_pages=(99,), num_drafts=0, device=CPU
    )
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
    return build_inputs(table, plan)


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
    assert attention.block_table[:, :2].tolist() == [[5, 1], [7, 3], [4, 6]]
    assert {attention.query_start.dtype, attention.context_len.dtype, attention.block_table.dtype} == {torch.int32}


def test_the_rows_that_sample_are_told_with_the_place_of_their_new_token(inputs: StepInputs) -> None:
    assert inputs.batch.sample_index.tolist() == [0, 5]
    assert inputs.layout.sampling == (SamplingStep(2, 6, 0), SamplingStep(1, 4, 0))
    assert (inputs.sample_row.tolist(), inputs.sample_position.tolist()) == ([2, 1], [7, 5])


@pytest.fixture
def verifying() -> StepInputs:
    """Row 1 decodes, row 0 verifies two drafts, row 2 computes the end of a prompt; windows and states."""
    window = KvLayerLayout(num_kv_heads=1, key_dim=1, value_dim=1, dtype="float32", window=3)
    state = StateLayerLayout(tensors=(StateTensor(name="s", shape=(1,), dtype="float32"),))
    groups = KvLayout(layers=(*LAYOUT.layers, window, state)).groups
    table = RowTable(
        num_rows=3, max_model_len=16, block_size=4, groups=groups, num_pages=(99, 99, 99), num_drafts=2, device=CPU
    )
    entering = [
        (1, range(20, 26), (5, 1), (0, 3), (8,), ()),
        (0, range(40, 46), (7, 3), (6, 2), (), (91, 92)),
        (2, range(60, 65), (4, 6), (5, 4), (), ()),
    ]
    new_rows = tuple(
        NewRow(
            row=row,
            request_id=str(row),
            token_ids=tuple(tokens),
            num_prompt_tokens=len(tokens),
            pages=(blocks, in_window, states),
            sampling=SamplingParams(seed=0),
            drafts=drafts,
        )
        for row, tokens, blocks, in_window, states, drafts in entering
    )
    rows = (
        RowStep(1, 5, 1, samples=True, new_pages=((), (), (10, 11, 12))),
        RowStep(0, 5, 3, samples=True, new_pages=((), (), (20, 21, 22)), num_drafts=2),
        RowStep(2, 2, 3, samples=True, new_pages=((), (), (30, 31, 32))),
    )
    plan = StepPlan(step_id=0, new_rows=new_rows, rows=rows)
    table.apply(plan)
    return build_inputs(table, plan)


def test_drafts_are_computed_behind_the_newest_token_and_sampled_after_each(verifying: StepInputs) -> None:
    assert verifying.batch.token_ids.tolist() == [25, 45, 91, 92, 62, 63, 64]
    assert verifying.batch.positions.tolist() == [5, 5, 6, 7, 2, 3, 4]
    assert verifying.batch.sample_index.tolist() == [0, 1, 2, 3, 6]
    assert verifying.layout.sampling == (SamplingStep(1, 5, 0), SamplingStep(0, 5, 2), SamplingStep(2, 4, 0))
    assert verifying.sample_row.tolist() == [1, 0, 0, 0, 2]
    assert verifying.sample_position.tolist() == [6, 6, 7, 8, 5]
    assert verifying.layout.first_sample.tolist() == [0, 1, 4]


def test_each_window_has_its_own_pages(verifying: StepInputs) -> None:
    full, window = verifying.batch.attention[None], verifying.batch.attention[3]
    assert (full.window, window.window) == (None, 3)
    assert full.block_table[:, :2].tolist() == [[5, 1], [7, 3], [4, 6]]
    assert window.block_table[:, :2].tolist() == [[0, 3], [6, 2], [5, 4]]
    assert full.slot.tolist() == [5, 13, 14, 15, 18, 19, 24]
    assert window.slot.tolist() == [13, 9, 10, 11, 22, 23, 16]


def test_states_are_read_where_the_newest_is_and_written_behind_each_draft(verifying: StepInputs) -> None:
    state = verifying.batch.state
    assert state is not None
    assert state.read_page.tolist() == [8, -1, -1]
    assert state.write_page.tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert state.keeps_all_cpu == (False, True, False)
