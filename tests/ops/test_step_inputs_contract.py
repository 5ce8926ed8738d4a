"""Every backend places a step's tokens where their rows are, also those whose rows the device alone knows."""

from __future__ import annotations

import random

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops import triton as kernels
from atom_cluster.ops.step_inputs import PlaceTokens, RowTables, StepRows

BACKENDS = {"torch": torch_ref.place_tokens, "triton": kernels.place_tokens}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_ROWS, BLOCK_SIZE, NUM_COLUMNS = 9, 4, 300


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("place", BACKENDS.values(), ids=BACKENDS)
def test_tokens_are_those_of_their_rows(place: PlaceTokens, seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_known = [draw.randint(1, 900) for _ in range(NUM_ROWS)]
    tokens = torch.randint(0, 1000, (NUM_ROWS, NUM_COLUMNS * BLOCK_SIZE), generator=generator, dtype=torch.int32)
    pages = [torch.randperm(NUM_ROWS * NUM_COLUMNS, generator=generator).view(NUM_ROWS, -1).int() for _ in range(2)]
    steps = []
    for row in draw.sample(range(NUM_ROWS), 5):
        start = draw.choice([-1, draw.randint(0, num_known[row] - 1)])
        longest = 4 if start < 0 else num_known[row] - start
        steps.append((row, start, draw.choice([1, draw.randint(1, longest)])))
    starts = torch.tensor([0, *(count for _, _, count in steps)]).cumsum(0)
    rows = StepRows(
        row=torch.tensor([row for row, _, _ in steps], device=DEVICE),
        start=torch.tensor([start for _, start, _ in steps], device=DEVICE),
        query_start=starts.int().to(DEVICE),
        num_tokens=int(starts[-1]),
    )
    tables = RowTables(
        tokens=tokens.to(DEVICE),
        num_known=torch.tensor(num_known, device=DEVICE),
        pages=tuple(group.to(DEVICE) for group in pages),
        block_size=BLOCK_SIZE,
    )
    block_tables = tuple(torch.full((5, 240), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))

    placed = place(rows, tables, block_tables)

    expected = []
    for index, (row, start, count) in enumerate(steps):
        first = num_known[row] - 1 if start < 0 else start
        expected += [(row, position) for position in range(first, first + count)]
        assert placed.context_len[index] == first + count
        num_pages = -(-(first + count) // BLOCK_SIZE)
        for group, block_table in zip(pages, block_tables):
            assert block_table[index, :num_pages].tolist() == group[row, :num_pages].tolist()
    assert list(zip(placed.token_row.tolist(), placed.positions.tolist())) == expected
    assert placed.token_ids.tolist() == [int(tokens[where]) for where in expected]
    for group, slot in zip(pages, placed.slots):
        found = [int(group[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for row, p in expected]
        assert slot.tolist() == found
    assert placed.context_len.dtype == torch.int32
    assert {x.dtype for x in (placed.token_ids, placed.positions, placed.token_row, *placed.slots)} == {torch.int64}
