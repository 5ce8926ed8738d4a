"""On a GPU: the sparse index selects what the reference selects. Scores are whole numbers, so that many are equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.select import float8_dtype_of
from atom_cluster.ops.triton import sparse_index
from atom_cluster.platform.detect import detect_platform
from tests.ops.triton.test_mla_gpu import make_metadata, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

STEPS = {
    "one": ([(3000, 1)], 2048),
    "decodes": ([(1, 1), (2048, 1), (2049, 1), (9000, 1), (130, 1)], 2048),
    "few": ([(40, 1), (50, 3), (7, 7)], 64),
    "drafts": ([(5000, 2), (300, 2), (2, 2)], 100),
    "mixed": ([(200, 1), (5000, 1), (40, 3), (900, 600), (70, 70), (33, 1), (1029, 129)], 128),
    "long": ([(70000, 1), (66000, 1)], 2048),
}


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("tokens_per_entry", [1, 4, 32])
@pytest.mark.parametrize("num_heads", [64, 5])
@pytest.mark.parametrize("step", STEPS)
def test_the_index_selects_what_the_reference_selects(
    step: str, num_heads: int, tokens_per_entry: int, is_narrow: bool
) -> None:
    rows, num_selected = STEPS[step]
    metadata = make_metadata(rows, 16)
    num_selected = max(16, num_selected // tokens_per_entry)
    with torch.inference_mode():
        inputs = make_inputs(metadata, num_heads, tokens_per_entry, is_narrow)
        query, weight, kv = inputs
        expected = torch_ref.plan_index(metadata, tokens_per_entry=tokens_per_entry).select(
            query, weight, kv, num_selected=num_selected
        )
        poison()
        found = sparse_index.plan_index(metadata, tokens_per_entry=tokens_per_entry).select(
            query, weight, kv, num_selected=num_selected
        )
        if expected is None:
            assert found is None
            return
        assert found is not None
        assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)
        count = (found >= 0).sum(-1, keepdim=True)
        assert ((found >= 0) == (torch.arange(num_selected, device="cuda") < count)).all(), "-1 comes last"


def test_scores_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = make_metadata(STEPS["mixed"][0], 16)
    with torch.inference_mode():
        query, weight, kv = make_inputs(metadata, 64, 1, False)
        whole = sparse_index.plan_index(metadata).select(query, weight, kv, num_selected=128)
        monkeypatch.setattr(sparse_index, "MAX_SCORES", 5000 * 100)
        parts = sparse_index.plan_index(metadata).select(query, weight, kv, num_selected=128)
    assert whole is not None and parts is not None
    assert torch.equal(whole, parts)


def test_a_captured_step_follows_the_device() -> None:
    long = make_metadata([(3000, 2)] * 3, 16)
    metadata = replace(long, context_len=long.context_len.clone(), context_len_cpu=(50000,) * 3)
    with torch.inference_mode():
        query, weight, kv = make_inputs(long, 64, 1, False)

        def select() -> torch.Tensor:
            selected = sparse_index.plan_index(metadata).select(query, weight, kv, num_selected=256)
            assert selected is not None
            return selected

        select()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = select()
        for lengths in ((3000, 2, 257), (258, 1500, 2999)):
            metadata.context_len.copy_(torch.tensor(lengths, dtype=torch.int32))
            poison()
            graph.replay()
            exact = replace(metadata, context_len_cpu=lengths)
            expected = torch_ref.plan_index(exact).select(query, weight, kv, num_selected=256)
            assert expected is not None
            assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)


def test_keys_are_stored() -> None:
    metadata = make_metadata([(40, 1), (300, 200), (5, 5)], 16)
    with torch.inference_mode():
        kv = KvLayerCache(torch.zeros(40, 3, 16, 1, 128, device="cuda", dtype=torch.bfloat16)[:, 1], torch.empty(0))
        expected = replace(kv, key=kv.key.clone())
        key = torch.randn(206, 192, device="cuda").bfloat16()[:, 32:160]
        sparse_index.plan_index(metadata).store(key, kv)
        torch_ref.plan_index(metadata).store(key, expected)
    assert torch.equal(kv.key, expected.key)


def make_inputs(
    metadata: AttentionMetadata, num_heads: int, tokens_per_entry: int, is_narrow: bool
) -> tuple[torch.Tensor, torch.Tensor, KvLayerCache]:
    dtype = float8_dtype_of(detect_platform("auto")) if is_narrow else torch.bfloat16
    num_tokens, num_pages = metadata.query_start_cpu[-1], int(metadata.block_table.max()) + 1

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, device="cuda")

    keys = whole(num_pages, 3, max(1, 16 // tokens_per_entry), 1, 128).to(torch.bfloat16).to(dtype)
    kv = KvLayerCache(keys[:, 1], keys[:, 1, ..., :0], key_scale=0.5 if is_narrow else 1.0)
    return whole(num_tokens, num_heads, 128).bfloat16(), whole(num_tokens, num_heads).float(), kv
