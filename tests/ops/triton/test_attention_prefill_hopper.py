"""Attention of prompts by sm_90's kernel, run as it stands by threads on the CPU, is the reference's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import attention_prefill_hopper, plan_attention, runtime
from tests.ops import test_attention_contract as contract
from tests.ops.test_attention_contract import Rows, randn, scattered_rows
from tests.ops.triton.gluon_on_cpu import Descriptor, Machine

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

FUNCTIONS = ["attend_kernel", "_load", "_line_of", "_clear", "_attend", "_seen"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(seed=3)
    machine.install(monkeypatch, attention_prefill_hopper, FUNCTIONS)
    monkeypatch.setattr(attention_prefill_hopper, "_units_of", units_of)
    monkeypatch.setattr(attention_prefill_hopper, "is_fit", lambda *_: True)
    monkeypatch.setattr(attention_prefill_hopper, "is_faster", lambda *_: True)
    return machine


def units_of(paged: torch.Tensor) -> Descriptor:
    """As lines of an entry's heads, whatever lies between pages."""
    num_pages, block_size, num_heads, dim = paged.shape
    page, entry, head, _ = paged.stride()
    lines = ((num_pages - 1) * (page // entry) + block_size, (num_heads - 1) * head + dim)
    unit, panel = attention_prefill_hopper.UNIT, attention_prefill_hopper.PANEL
    return Descriptor(paged.as_strided(lines, (entry, 1)), unit, num_columns=panel)


STEPS: dict[str, Rows] = {
    "a prompt": [(300, 300)],
    "a prompt of whole pages": [(256, 256)],
    "few queries behind many keys": [(700, 20)],
    "prompts and chunks": [(40, 40), (333, 205), (129, 129), (515, 77)],
    "behind rows that decode": [(9, 1), (200, 1), (160, 100)],
}


@dataclass(frozen=True)
class Heads:
    num_kv_heads: int = 2
    group: int = 4
    dim: int = 128
    block_size: int = 32
    window: int | None = None
    has_sinks: bool = False


HEADS = {
    "one": Heads(1, 1, block_size=16),
    "groups": Heads(),
    "no power of two": Heads(1, 7, block_size=64),
    "wide": Heads(1, 2, 256),
    "narrow, sinks": Heads(2, 8, 64, has_sinks=True),
    "window": Heads(1, 3, window=100),
    "window of one": Heads(1, 2, block_size=16, window=1),
    "window and sinks": Heads(1, 2, 64, block_size=16, window=150, has_sinks=True),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", STEPS)
def test_steps(machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, heads: str) -> None:
    layer, rows = HEADS[heads], STEPS[name]
    monkeypatch.setattr(contract, "BLOCK_SIZE", layer.block_size)
    metadata, blocks = scattered_rows(rows, layer.window)
    # There are values only where some query sees them. The machine takes keys that are no numbers for some that were
    # not there.
    shape = (3, 2, layer.block_size, layer.num_kv_heads, layer.dim)
    memory = torch.full((1 + sum(map(len, blocks)), *shape), float("nan"))
    memory[:, 1, 0] = 1e4
    for index, (pages, (context_len, num_new)) in enumerate(zip(blocks, rows)):
        position = torch.arange(context_len)
        if layer.window is not None:
            first = max(0, context_len - num_new - layer.window + 1)
            position = position[first:]
        entries = randn(len(position), 2, layer.num_kv_heads, layer.dim, seed=index).float()
        memory[pages[position // layer.block_size], 1, :, position % layer.block_size] = entries
    num_heads = layer.num_kv_heads * layer.group
    query = randn(metadata.query_start_cpu[-1], num_heads, layer.dim, seed=1).float()
    sinks = randn(num_heads, seed=6).float() * 3 if layer.has_sinks else None
    kv = KvLayerCache(memory[:, 1, 0], memory[:, 1, 1], 0.5, 2.0)
    known = KvLayerCache(kv.key.double().nan_to_num(), kv.value.double().nan_to_num(), 0.5, 2.0)
    wide = None if sinks is None else sinks.double()
    expected = torch_ref.plan_attention(metadata).attend(query.double(), known, scale=0.2, sink_H=wide)
    found = plan_attention(metadata).attend(query, kv, scale=0.2, sink_H=sinks)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    assert machine.num_launches == 1


def test_a_row_alone_decides_by_which_kernel_it_is_computed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "BLOCK_SIZE", 16)
    monkeypatch.setattr(attention_prefill_hopper, "is_faster", lambda num_keys, *_: num_keys >= 200)
    rows: Rows = [(40, 40), (200, 60), (100, 30), (260, 18)]
    metadata, blocks = scattered_rows(rows, None)
    memory = randn(1 + sum(map(len, blocks)), 2, 16, 1, 64, seed=1).float()
    query = randn(metadata.query_start_cpu[-1], 2, 64, seed=2).float()
    kv = KvLayerCache(memory[:, 0], memory[:, 1])
    together = plan_attention(metadata).attend(query, kv, scale=0.2)
    assert machine.num_launches == 1
    expected = torch_ref.plan_attention(metadata).attend(query, kv, scale=0.2)
    torch.testing.assert_close(together, expected, atol=2e-5, rtol=2e-5)
    for row, (context_len, num_new) in enumerate(rows):
        tokens = slice(*metadata.query_start_cpu[row : row + 2])
        alone = replace(
            metadata,
            query_start=torch.tensor([0, num_new], dtype=torch.int32),
            context_len=metadata.context_len[row : row + 1],
            block_table=metadata.block_table[row : row + 1],
            slot=metadata.slot[tokens],
            query_start_cpu=(0, num_new),
            context_len_cpu=(context_len,),
        )
        assert torch.equal(plan_attention(alone).attend(query[tokens], kv, scale=0.2), together[tokens])
