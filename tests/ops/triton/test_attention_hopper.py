"""Decode attention by sm_90's kernel, run as it stands by threads on the CPU, is the reference's."""

from __future__ import annotations

import random

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import (
    attention_decode_hopper,
    attention_decode_loads,
    attention_decode_pieces,
    plan_attention,
    runtime,
)
from atom_cluster.ops.triton.attention_parts import FIRST_LISTED, LISTED_UNITS, schedule_parts
from atom_cluster.units import ceil_div
from tests.ops import test_attention_contract as contract
from tests.ops.test_attention_contract import Rows, randn, scattered_rows
from tests.ops.triton.gluon_on_cpu import Machine

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

DIM = 64
BLOCK_SIZE = 32
FUNCTIONS = [
    "_decode_hopper_kernel",
    "next_row",
    "span",
    "load_blocks",
    "_load_queries",
    "_attend",
    "finish_row",
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(contract, "BLOCK_SIZE", BLOCK_SIZE)
    machine = Machine(seed=1)
    machine.install(monkeypatch, attention_decode_hopper, FUNCTIONS, "_decode_hopper_kernel")
    machine.adapt(monkeypatch, attention_decode_pieces)
    machine.adapt(monkeypatch, attention_decode_loads)
    for name in ("next_row", "span"):
        monkeypatch.setattr(attention_decode_loads, name, getattr(attention_decode_hopper, name))
    monkeypatch.setattr(attention_decode_hopper, "_unpack_queries", unpack_queries)
    monkeypatch.setattr(attention_decode_hopper, "_widen", widen)
    monkeypatch.setattr(attention_decode_loads, "_fetch", lambda _: None)
    monkeypatch.setattr(attention_decode_hopper, "is_fit", lambda *_, **__: True)
    return machine


STEPS: dict[str, Rows] = {
    "one": [(9, 1)],
    "a row cut into pieces": [(1500, 1)],
    "rows of very different lengths": [(1, 1), (700, 1), (128, 1), (33, 1), (129, 1)],
    "drafts": [(9, 3), (300, 3), (3, 3)],
    "decodes and drafts": [(257, 1), (40, 1), (170, 2), (5, 5)],
    "many drafts": [(300, 10), (12, 9)],
    "rows without tokens": [(40, 1), (300, 0), (0, 0), (130, 1), (70, 2), (16, 0)],
}


@pytest.mark.parametrize(("num_kv_heads", "window", "has_sinks"), [(1, None, False), (3, 100, True), (2, 7, True)])
@pytest.mark.parametrize("name", STEPS)
def test_steps(machine: Machine, name: str, num_kv_heads: int, window: int | None, has_sinks: bool) -> None:
    check(machine, STEPS[name], num_kv_heads, window, has_sinks=has_sinks)


@pytest.mark.parametrize("name", ["a row cut into pieces", "decodes and drafts"])
def test_eight_bits(machine: Machine, name: str) -> None:
    check(machine, STEPS[name], 2, 200, has_sinks=True, dtype=torch.bfloat16, stored=torch.float8_e4m3fn)


@pytest.mark.parametrize("seed", range(12))
def test_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are some part's, and parts know who else has blocks of their rows, and their first pages."""
    monkeypatch.setattr(contract, "BLOCK_SIZE", BLOCK_SIZE)
    draw = random.Random(seed)
    most = draw.choice([100, 1000, 5000])
    rows = [(draw.randint(1, most), 1) for _ in range(draw.randint(1, 12))]
    window, num_parts = draw.choice([None, None, 300]), draw.choice([3, 8, 33])
    metadata, _ = scattered_rows(rows, window)
    items = schedule_parts(
        metadata, num_rows=len(rows), num_parts=num_parts, block=64, unit=16, min_blocks=draw.choice([1, 2])
    ).tolist()
    starts = [0 if window is None else max(0, length - window) // 16 * 16 for length, _ in rows]
    counts = [ceil_div(length - start, 64) for (length, _), start in zip(rows, starts)]
    row_of = [row for row, count in enumerate(counts) for _ in range(count)]
    begins = [sum(counts[:row]) for row in range(len(rows))]
    used = [(part, item) for part, item in enumerate(items) if item[1] < item[2]]
    assert [block for _, item in used for block in range(item[1], item[2])] == list(range(sum(counts)))
    of_row = [[part for part, item in used if row in row_of[item[1] : item[2]]] for row in range(len(rows))]
    for _, (row, begin, end, row_begin, token, num_queries, length, first, pieces, last_pieces, *_) in used:
        assert (row, row_begin, token, num_queries, length) == (row_of[begin], begins[row], row, 1, rows[row][0])
        assert (first, pieces, last_pieces) == (of_row[row][0], len(of_row[row]), len(of_row[row_of[end - 1]]))
    for _, item in used:
        position = starts[item[0]] + (item[1] - item[3]) * 64
        known = range(position, item[6], 16)[:LISTED_UNITS]
        table = metadata.block_table[item[0]]
        assert item[FIRST_LISTED:][: len(known)] == [int(table[place // BLOCK_SIZE]) for place in known]


def check(
    machine: Machine,
    rows: Rows,
    num_kv_heads: int,
    window: int | None,
    *,
    has_sinks: bool,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
) -> None:
    """There are numbers only where some query sees them."""
    num_heads = 3 * num_kv_heads
    metadata, blocks = scattered_rows(rows, window)
    memory = torch.full((1 + sum(map(len, blocks)), 3, 2, BLOCK_SIZE, num_kv_heads, DIM), float("nan"))
    for index, (pages, (context_len, num_new)) in enumerate(zip(blocks, rows)):
        position = torch.arange(context_len)
        if window is not None:
            position = position[max(0, context_len - num_new - window + 1) :]
        entries = randn(len(position), 2, num_kv_heads, DIM, seed=index).float()
        memory[pages[position // BLOCK_SIZE], 1, :, position % BLOCK_SIZE] = entries
    memory = memory.to(stored)
    query = randn(metadata.query_start_cpu[-1], num_heads, DIM, seed=1).to(dtype)
    sinks = randn(num_heads, seed=6).float() * 3 if has_sinks else None
    kv = KvLayerCache(memory[:, 1, 0], memory[:, 1, 1], 0.5, 2.0)
    known = KvLayerCache(kv.key.double().nan_to_num(), kv.value.double().nan_to_num(), 0.5, 2.0)
    wide = None if sinks is None else sinks.double()
    expected = torch_ref.plan_attention(metadata).attend(query.double(), known, scale=0.2, sink_H=wide)
    plan, tolerance = plan_attention(metadata), 2e-5 if dtype == torch.float32 else 1e-2
    for _ in range(2):
        found = plan.attend(query, kv, scale=0.2, sink_H=sinks)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert machine.num_launches == 2


def unpack_queries(pairs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    even, odd = pairs.contiguous().view(dtype).float().unflatten(-1, (-1, 2)).unbind(-1)
    power = torch.maximum(even.abs(), odd.abs()).amax(-1).clamp(min=1e-30).log2().floor().exp2()
    return even / power[..., None], odd / power[..., None], power


def widen(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    even, odd = pairs.contiguous()[..., None].view(torch.float8_e4m3fn).float().unbind(-1)
    return even, odd
