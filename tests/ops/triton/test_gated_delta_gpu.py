"""Gated DeltaNet on a GPU with the dims of real models, in steps of all kinds, against the reference in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.cpu import plan_gated_delta as plan_in_torch
from atom_cluster.ops.gated_delta import Gates, StateMetadata
from tests.ops.triton.test_norm_gpu import poisoned_memory, randn

__all__ = ["poisoned_memory"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

WIDTH = 4
ERROR = {torch.bfloat16: 6e-3, torch.float32: 3e-6}
STEPS = {
    "decode": [(1, False)] * 37,
    "drafts": [(3, True)] * 9,
    "one prompt": [(1000, False)],
    "mixed": [(1, False), (1, True), (3, True), (130, False), (2, True), (64, False), (65, False), (2, False)],
    "prompts": [(700, False), (5, False), (3000, False)],
}


def metadata(rows: list[tuple[int, bool]]) -> tuple[AttentionMetadata, StateMetadata, int]:
    """Rows of so many tokens that keep all states or not: some begin, some write where they read."""
    lengths = [length for length, _ in rows]
    starts = list(itertools.accumulate(lengths, initial=0))
    width = max([length for length, keeps in rows if keeps], default=1)
    pages = list(range(len(rows) * (width + 1)))
    random.Random(0).shuffle(pages)
    written = torch.tensor(pages[: len(rows) * width]).view(len(rows), width)
    read = [written[row, 0] if row % 3 == 0 else -1 if row % 3 == 1 else pages[-1 - row] for row in range(len(rows))]
    attention = AttentionMetadata(
        block_size=16,
        num_decode_rows=next((row for row, length in enumerate(lengths) if length > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        context_len=torch.zeros(len(rows), dtype=torch.int32, device="cuda"),
        block_table=torch.zeros(len(rows), 1, dtype=torch.int32, device="cuda"),
        slot=torch.zeros(starts[-1], dtype=torch.int64, device="cuda"),
        query_start_cpu=tuple(starts),
        context_len_cpu=(0,) * len(rows),
    )
    keeps_all = tuple(keeps for _, keeps in rows)
    states = StateMetadata(
        read_page=torch.tensor(read, device="cuda"), write_page=written.cuda(), keeps_all_cpu=keeps_all
    )
    return attention, states, len(pages)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dims", [(16, 32, 128, 128), (2, 6, 64, 96), (3, 3, 48, 32)], ids=str)
def test_a_layer(name: str, dims: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from atom_cluster.ops.triton import plan_gated_delta

    torch.manual_seed(0)
    rows, states, num_pages = metadata(STEPS[name])
    key_heads, heads, key_dim, value_dim = dims
    sizes = [key_heads * key_dim, key_heads * key_dim, heads * value_dim]
    num_tokens, num_channels = rows.query_start_cpu[-1], sum(sizes)
    x = randn(num_tokens, num_channels + 16, dtype=dtype)[:, 16:]
    # Neighbouring tokens have keys that are alike, now and then, as texts that repeat themselves do.
    x[num_tokens // 4 : num_tokens // 2] = x[num_tokens // 4]
    weight = randn(num_channels, WIDTH, dtype=dtype)
    past = randn(num_pages, 2, num_channels, WIDTH - 1, dtype=dtype)[:, 1]
    learn, decay = randn(num_tokens, 2 * heads, dtype=dtype).chunk(2, dim=1)
    gates = Gates(decay, learn, randn(heads, dtype=torch.float32) - 1, randn(heads, dtype=torch.float32))
    memory = randn(num_pages, 2, heads, key_dim, value_dim, dtype=torch.float32)[:, 1] * 0.1

    ours, theirs = plan_gated_delta(rows, states), plan_in_torch(rows, states)
    old_past, their_past = past.clone(), past.double()
    y, their_y = ours.convolve(x, weight, past), theirs.convolve(x.double(), weight.double(), their_past)
    assert error(y, their_y) < ERROR[dtype]
    assert torch.equal(past.double(), their_past)
    assert not torch.equal(past, old_past)

    parts = [part.view(num_tokens, -1, dim) for part, dim in zip(y.split(sizes, 1), (key_dim, key_dim, value_dim))]
    their_memory = memory.double()
    output = ours.delta_rule(*parts, gates, memory)
    wide = Gates(*(x.double() for x in (gates.decay_TH, gates.learn_TH, gates.log_rate_H, gates.decay_bias_H)))
    wanted = theirs.delta_rule(*(part.double() for part in parts), wide, their_memory)
    assert output.dtype == dtype and output.is_contiguous()
    assert error(output, wanted) < ERROR[dtype]
    is_written = (their_memory != memory.double()).flatten(1).any(1)
    assert error(memory, their_memory) < (ERROR[dtype] if any(n > 1 and not k for n, k in STEPS[name]) else 1e-6)
    unwritten = torch.ones(num_pages, dtype=torch.bool, device="cuda")
    unwritten[states.write_page.flatten()] = False
    assert not (is_written & unwritten).any()


def test_a_captured_step_follows_its_tensors() -> None:
    """A graph of a decode step is replayed with other states, pages and tokens."""
    from atom_cluster.ops.triton import plan_gated_delta

    rows, states, num_pages = metadata(STEPS["drafts"])
    num_tokens, dims = rows.query_start_cpu[-1], (4, 64)
    query, key, value = (randn(num_tokens, *dims, dtype=torch.bfloat16) for _ in range(3))
    x, weight = randn(num_tokens, 256, dtype=torch.bfloat16), randn(256, WIDTH, dtype=torch.bfloat16)
    past, memory = randn(num_pages, 256, 3, dtype=torch.bfloat16), randn(num_pages, 4, 64, 64, dtype=torch.float32)
    gates = Gates(*(randn(num_tokens, 4, dtype=torch.bfloat16) for _ in range(2)), *(torch.rand(2, 4, device="cuda")))

    def run() -> tuple[torch.Tensor, ...]:
        plan = plan_gated_delta(rows, states)
        return plan.convolve(x, weight, past), plan.delta_rule(query, key, value, gates, memory)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for tensor in (query, key, value, x, past, memory):
        tensor.copy_(torch.randn_like(tensor))
    states.read_page.copy_(states.read_page.roll(1))
    before = past.clone(), memory.clone()
    graph.replay()
    found_all = [tensor.clone() for tensor in (*found, past, memory)]
    past.copy_(before[0])
    memory.copy_(before[1])
    for again, wanted in zip(found_all, (*run(), past, memory)):
        assert torch.equal(again, wanted)
