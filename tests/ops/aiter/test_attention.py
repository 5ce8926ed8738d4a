"""Steps of all kinds reach AITER's attention in pages as it reads them, and come back whole; with a stand-in for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.ops.aiter import FAMILIES, mla
from atom_cluster.ops.aiter import attention as aiter_attention
from atom_cluster.ops.aiter.rows import list_pages, list_tokens
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, MlaDims
from atom_cluster.ops.select import torch_table
from atom_cluster.ops.table import OpTable
from tests.ops.aiter import stand_in

HALF = torch.bfloat16
BLOCK_SIZE = 16
Rows = list[tuple[int, int]]
"""(tokens of the row including this step's, of which new), rows with one new token first."""

STEPS: dict[str, Rows] = {
    "decode": [(9, 1), (16, 1), (33, 1), (300, 1)],
    "prompts": [(13, 13), (40, 7), (16, 16)],
    "both": [(9, 1), (40, 1), (17, 5), (32, 32), (30, 11)],
    "drafts": [(9, 3), (40, 3)],
}
DECODE, PREFILL = "paged_attention_v1", "mha_batch_prefill_func"


def ops_by_aiter(family: str) -> OpTable:
    behind = torch_table("behind")
    return replace(behind, **FAMILIES[family].ops(behind, False))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(rows: Rows, *, window: int | None = None, block_size: int = BLOCK_SIZE, spare: int = 0) -> AttentionMetadata:
    """spare: columns of the block table beyond those that the longest row needs."""
    counts = [-(-context_len // block_size) for context_len, _ in rows]
    ids = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))).split(counts)
    table = torch.zeros(len(rows), max(counts) + spare, dtype=torch.int32)
    slots, starts = [], [0]
    for row, (context_len, num_new) in enumerate(rows):
        table[row, : counts[row]] = ids[row]
        positions = range(context_len - num_new, context_len)
        slots += [int(ids[row][p // block_size]) * block_size + p % block_size for p in positions]
        starts.append(starts[-1] + num_new)
    return AttentionMetadata(
        block_size=block_size,
        window=window,
        num_decode_rows=sum(num_new == 1 for _, num_new in rows),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32),
        block_table=table,
        slot=torch.tensor(slots),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(context_len for context_len, _ in rows),
    )


def memory(metadata: AttentionMetadata, num_heads: int, dims: tuple[int, int], dtype: torch.dtype) -> KvLayerCache:
    """The second of three layers, its pages far apart."""
    num_pages = int(metadata.block_table.max()) + 1
    pages = randn(num_pages, 3, metadata.block_size * num_heads * sum(dims), seed=3).to(dtype)[:, 1]
    key, value = pages.tensor_split([metadata.block_size * num_heads * dims[0]], dim=1)
    shape = (num_pages, metadata.block_size, num_heads)
    return KvLayerCache(key.view(*shape, dims[0]), value.view(*shape, dims[1]))


def attend(metadata: AttentionMetadata, **options: object) -> None:
    """Compare with the reference, both on the same memory."""
    dtype = options.get("dtype", HALF)
    head_dim, num_heads = int(options.get("head_dim", 128)), int(options.get("num_heads", 4))
    kv = memory(metadata, 2, (head_dim, int(options.get("value_dim", head_dim))), options.get("stored", dtype))
    num_tokens = metadata.query_start_cpu[-1]
    query, key = randn(num_tokens, num_heads, head_dim).to(dtype), randn(num_tokens, 2, head_dim, seed=1).to(dtype)
    value = randn(num_tokens, 2, kv.value.shape[-1], seed=2).to(dtype)
    sinks = options.get("sink_H")
    plans = [ops.plan_attention(metadata) for ops in (ops_by_aiter("attention"), torch_table("reference"))]
    assert torch.equal(plans[0].store(query, key, value, kv), query)
    found, expected = (plan.attend(query, kv, scale=0.2, sink_H=sinks) for plan in plans)
    assert found.is_contiguous() and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    attend(step(STEPS[name], spare=spare))
    assert calls == {"decode": [DECODE], "both": [DECODE, PREFILL]}.get(name, [PREFILL])


@pytest.mark.parametrize(
    ("change", "called"),
    [
        ({"window": 20}, [PREFILL]),
        ({"block_size": 8}, []),
        ({"block_size": 32}, [DECODE]),
        ({"head_dim": 96}, []),
        ({"head_dim": 64}, [DECODE]),
        ({"head_dim": 256}, [PREFILL]),
        ({"value_dim": 32}, []),
        ({"dtype": torch.float32}, []),
        ({"stored": torch.float8_e4m3fn}, []),
        ({"sink_H": torch.ones(4)}, []),
        ({"num_heads": 64}, [PREFILL]),
    ],
    ids=lambda change: next(iter(change), "nothing"),
)
def test_what_has_no_kernel_is_left_to_the_backend_behind(
    change: dict[str, object], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in.install(monkeypatch)
    of_step = {name: change.pop(name) for name in ("window", "block_size") if name in change}
    attend(step(STEPS["both"], **of_step), **change)
    assert calls == called


def test_a_workspace_that_would_be_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    monkeypatch.setattr(aiter_attention, "WORKSPACE_LIMIT", 1000)
    attend(step(STEPS["both"]))
    assert calls == [PREFILL]


def test_the_device_decides_how_long_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    exact = step(STEPS["both"], spare=3)
    rough = replace(exact, context_len_cpu=tuple(length + 20 for length in exact.context_len_cpu))
    kv = memory(exact, 2, (128, 128), HALF)
    query = randn(exact.query_start_cpu[-1], 4, 128).to(HALF)
    found = ops_by_aiter("attention").plan_attention(rough).attend(query, kv, scale=0.2)
    expected = torch_table("reference").plan_attention(exact).attend(query, kv, scale=0.2)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert calls == [DECODE, PREFILL]


def test_pages_of_one_token_are_listed_row_by_row() -> None:
    metadata = step([(5, 1), (4, 1), (1, 1)], block_size=4, spare=2)
    tokens = list_tokens(metadata, 100)
    assert tokens.start.tolist() == [0, 5, 9, 10]
    assert tokens.last_len.tolist() == [1, 1, 1]
    first, second, third, fourth = (
        100 * int(block) for block in (*metadata.block_table[0][:2], *metadata.block_table[1:, 0])
    )
    expected = [*range(first, first + 4), second, *range(third, third + 4), fourth]
    assert tokens.page[:10].tolist() == expected


def test_pages_are_listed_row_by_row() -> None:
    metadata = step([(33, 1), (16, 1), (1, 1)], spare=4)
    pages = list_pages(metadata)
    assert pages.start.tolist() == [0, 3, 4, 5]
    assert pages.last_len.tolist() == [1, 16, 1]
    table = metadata.block_table.tolist()
    assert pages.page[:5].tolist() == [*table[0][:3], table[1][0], table[2][0]]


DIMS = MlaDims(num_heads=16, latent_dim=512, nope_dim=24, rope_dim=64, value_dim=20)


def attend_to_latents(
    metadata: AttentionMetadata,
    *,
    dims: MlaDims = DIMS,
    dtype: torch.dtype = HALF,
    stored: torch.dtype | None = None,
    selected: torch.Tensor | None = None,
) -> None:
    num_tokens = metadata.query_start_cpu[-1]
    kv = memory(metadata, 1, (dims.latent_dim + dims.rope_dim, 0), stored or dtype)
    weight = randn(dims.num_heads, dims.nope_dim + dims.value_dim, dims.latent_dim, seed=4) * 0.05
    query = randn(num_tokens, dims.num_heads, dims.nope_dim).to(dtype)
    rope = randn(num_tokens, dims.num_heads, dims.rope_dim, seed=1).to(dtype)
    latent, key = randn(num_tokens, dims.latent_dim, seed=2).to(dtype), randn(num_tokens, dims.rope_dim).to(dtype)
    rotation = Rotation(randn(num_tokens, 1, dims.rope_dim, seed=6), randn(num_tokens, 1, dims.rope_dim, seed=7))
    outputs = []
    for ops in (ops_by_aiter("mla"), torch_table("reference")):
        plan, weights = ops.plan_mla(metadata, dims), ops.prepare_latent_weights(weight, dims, dtype=dtype)
        norm = LatentNorm(torch.ones(dims.latent_dim, dtype=dtype), 1e-6)
        turned = plan.store(latent, key, rope, kv, norm=norm, rotation=rotation, is_interleaved=True)
        outputs.append(plan.attend(query, turned, weights, kv, scale=0.05, selected_TK=selected))
    assert outputs[0].is_contiguous() and outputs[0].dtype == dtype
    torch.testing.assert_close(*outputs, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("name", STEPS)
def test_latent_steps(name: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    attend_to_latents(step(STEPS[name], spare=2, block_size=block_size))
    decode = ["get_mla_metadata_info_v1", "get_mla_metadata_v1", "mla_decode_fwd"]
    assert calls == (decode if name in ("decode", "both") else [])


def test_latents_that_have_no_kernel_are_left_to_the_backend_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    metadata = step(STEPS["decode"])
    attend_to_latents(metadata, dtype=torch.float32)
    attend_to_latents(metadata, stored=torch.float8_e4m3fn)
    attend_to_latents(metadata, dims=replace(DIMS, num_heads=3))
    attend_to_latents(metadata, dims=replace(DIMS, latent_dim=256))
    attend_to_latents(metadata, selected=torch.tensor([[0, 3], [1, 5], [2, -1], [200, 3]], dtype=torch.int32))
    for limit in ("MAX_SPAN", "MAX_LISTED"):
        with monkeypatch.context() as patch:
            patch.setattr(mla, limit, 1000)
            attend_to_latents(metadata)
    assert not calls


def test_the_work_of_rows_is_planned_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in.install(monkeypatch)
    metadata = step(STEPS["decode"])
    kv = memory(metadata, 1, (576, 0), HALF)
    plan = ops_by_aiter("mla").plan_mla(metadata, DIMS)
    weights = torch_table("reference").prepare_latent_weights(randn(16, 44, 512), DIMS, dtype=HALF)
    for _ in range(2):
        plan.attend(randn(4, 16, 24).to(HALF), randn(4, 16, 64).to(HALF), weights, kv, scale=0.05)
    assert calls.count("get_mla_metadata_v1") == 1 and calls.count("mla_decode_fwd") == 2
