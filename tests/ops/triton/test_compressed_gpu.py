"""On a GPU: compression, and attention to a window and entries, are the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.select import float8_dtype_of
from atom_cluster.ops.triton import compressed_attention, compression
from atom_cluster.platform.detect import detect_platform
from tests.ops.triton.test_mla_gpu import assert_close, make_metadata, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

ERROR = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
STEPS = {
    "one": [(3000, 1)],
    "decodes": [(1, 1), (3, 1), (2049, 1), (9000, 1), (130, 1)],
    "many decodes": [(1 + 37 * i % 800, 1) for i in range(160)],
    "drafts": [(5000, 2), (300, 4), (2, 2)],
    "mixed": [(200, 1), (5000, 1), (40, 3), (900, 600), (70, 70), (33, 1), (1029, 129)],
}


@pytest.mark.parametrize("dtype", ERROR, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("tokens_per_entry", "num_series"), [(4, 2), (4, 1), (128, 1), (32, 2)])
@pytest.mark.parametrize("step", STEPS)
def test_entries_are_the_references(step: str, tokens_per_entry: int, num_series: int, dtype: torch.dtype) -> None:
    full = make_metadata(STEPS[step], 16)
    tokens = replace(full, window=tokens_per_entry * num_series)
    num_tokens, width = full.query_start_cpu[-1], 512 * num_series
    with torch.inference_mode():
        value, gate = torch.randn(num_tokens, 2 * width, device="cuda").to(dtype).chunk(2, dim=-1)
        bias = torch.randn(tokens_per_entry * num_series, 512, device="cuda")
        inputs = paged(full.block_table, 16, width, width, dtype)
        kept = paged(full.block_table, max(1, 16 // tokens_per_entry), 512, 0, dtype)
        results = []
        for backend in (torch_ref, compression):
            inputs_copy, kept_copy = copied(inputs), copied(kept)
            poison()
            plan = backend.plan_compression(tokens, full, tokens_per_entry=tokens_per_entry, num_series=num_series)
            pooled = plan.pool(value, gate, bias, inputs_copy)
            plan.store(pooled, kept_copy)
            results.append((plan.first_positions, inputs_copy, pooled, kept_copy))
        expected, found = results
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].key, expected[1].key) and torch.equal(found[1].value, expected[1].value)
        assert_close(found[2], expected[2], 1e-5)
        assert_close(found[3].key, expected[3].key, ERROR[dtype])


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("dtype", ERROR, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_heads", [64, 5])
@pytest.mark.parametrize(("tokens_per_entry", "num_selected"), [(4, 100), (4, None), (128, None)])
@pytest.mark.parametrize("step", STEPS)
def test_attention_is_the_references(
    step: str, tokens_per_entry: int, num_selected: int | None, num_heads: int, dtype: torch.dtype, is_narrow: bool
) -> None:
    full = make_metadata(STEPS[step], 16)
    tokens = replace(full, window=100)
    num_tokens, stored = full.query_start_cpu[-1], dtype
    if is_narrow:
        stored = float8_dtype_of(detect_platform("auto"))
    with torch.inference_mode():
        query = torch.randn(num_tokens, num_heads, 512, device="cuda").to(dtype)
        window, entries = (
            replace(paged(full.block_table, size, 512, 0, stored), key_scale=0.7 if is_narrow else 1.0)
            for size in (16, max(1, 16 // tokens_per_entry))
        )
        sinks = torch.randn(num_heads, device="cuda")
        selected = None
        if num_selected is not None:
            seen = torch.cat([torch.arange(n - new, n, device="cuda") + 1 for n, new in STEPS[step]])
            seen = seen // tokens_per_entry
            # Every other entry, from a different one for each token; -1 behind those that there are.
            at = torch.arange(num_selected, device="cuda")[None] * 2 + seen[:, None] % 2
            selected = torch.where(at < seen[:, None], at, -1).int()
            counts = torch.minimum(seen, torch.tensor(num_selected, device="cuda"))
            every = torch.arange(num_selected, device="cuda")[None].expand(num_tokens, -1)
            few = torch.where(every < counts[:, None], every, -1).int()
            selected = torch.where((seen > 2 * num_selected + 1)[:, None], selected, few)
        results = []
        for backend in (torch_ref, compressed_attention):
            plan = backend.plan_compressed_attention(tokens, full, tokens_per_entry=tokens_per_entry)
            poison()
            is_reference = backend is torch_ref
            results.append(
                plan.attend(
                    query.float() if is_reference else query,
                    window,
                    entries,
                    scale=0.05,
                    sink_H=sinks,
                    selected_TK=selected,
                )
            )
        assert results[1].dtype == dtype and results[1].is_contiguous()
        assert_close(results[1], results[0], ERROR[dtype])


def paged(table: torch.Tensor, size: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> KvLayerCache:
    """The second of three layers of pages, filled with old numbers."""
    num_pages = int(table.max()) + 1
    memory = torch.randn(num_pages, 3, size, 1, key_dim + value_dim, device="cuda").to(dtype)
    return KvLayerCache(memory[:, 1, ..., :key_dim], memory[:, 1, ..., key_dim:])


def copied(cache: KvLayerCache) -> KvLayerCache:
    return replace(cache, key=cache.key.clone(), value=cache.value.clone())
