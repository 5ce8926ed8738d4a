"""On a GPU: latent attention and what comes before it are the reference's, whatever dims, dtypes and rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, MlaDims
from atom_cluster.ops.select import float8_dtype_of
from atom_cluster.ops.triton import mla as triton_mla
from atom_cluster.platform.detect import detect_platform
from atom_cluster.units import ceil_div

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Norm of the difference over the norm. In bfloat16, absorbed queries and mixtures are rounded on their way."""


@dataclass(frozen=True)
class Layer:
    dims: MlaDims
    dtype: torch.dtype = torch.bfloat16
    is_narrow: bool = False
    block_size: int = 16
    is_interleaved: bool = True


def dims(num_heads: int, latent: int = 512, nope: int = 128, rope: int = 64, value: int = 128) -> MlaDims:
    return MlaDims(num_heads=num_heads, latent_dim=latent, nope_dim=nope, rope_dim=rope, value_dim=value)


LAYERS = {
    "128 heads": Layer(dims(128)),
    "16 heads": Layer(dims(16)),
    "16 heads fp8": Layer(dims(16), is_narrow=True),
    "20 heads, odd pages, halves": Layer(dims(20), block_size=24, is_interleaved=False),
    "glm": Layer(dims(8, nope=192, value=256), block_size=64),
    "float32": Layer(dims(6), dtype=torch.float32),
    "tiny float32": Layer(dims(3, 24, 12, 8, 20), dtype=torch.float32),
    "tiny": Layer(dims(4, 40, 20, 16, 24)),
}

STEPS = {
    "one": [(700, 1)],
    "decode": [(1, 1), (17, 1), (64, 1), (3000, 1), (129, 1), (65, 1)],
    "drafts": [(4, 4), (900, 4), (130, 4)],
    "one prompt": [(300, 300)],
    "mixed": [(200, 1), (5000, 1), (40, 3), (600, 250), (70, 70), (2000, 30), (33, 1), (129, 129)],
    "many decodes": [(1 + 37 * i % 800, 1) for i in range(160)],
}


@pytest.mark.parametrize("is_sparse", [False, True], ids=["all", "sparse"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_latent_attention_is_the_reference(layer: str, step: str, is_sparse: bool) -> None:
    with torch.inference_mode():
        check(LAYERS[layer], STEPS[step], is_sparse)


@pytest.mark.parametrize("seed", range(8))
def test_random_steps(seed: int) -> None:
    choose = random.Random(seed)
    layer = choose.choice(list(LAYERS.values()))
    rows = []
    for _ in range(choose.choice([1, 3, 30])):
        queries = choose.choice([1, 1, 2, 5, 16, 17, 100, 400])
        rows.append((queries + choose.choice([0, 0, 1, 50, 1000]), queries))
    with torch.inference_mode():
        check(layer, sorted(rows, key=lambda row: row[1] > 1), choose.random() < 0.5)


@pytest.mark.parametrize("layer", ["16 heads", "glm"])
def test_long_prompts(layer: str) -> None:
    with torch.inference_mode():
        check(LAYERS[layer], [(70, 1), (2500, 2500), (2100, 2100), (2900, 2600)], is_sparse=False)


def test_a_captured_step_follows_the_device() -> None:
    """Replayed with other lengths than it was captured with; the host knows a bound only."""
    layer = LAYERS["16 heads"]
    with torch.inference_mode():
        long = make_metadata([(1500, 2)] * 5, layer.block_size)
        metadata = replace(long, context_len=long.context_len.clone(), context_len_cpu=(100000,) * 5)
        inputs = make_inputs(layer, long)
        weights = triton_mla.prepare_latent_weights(inputs.up, layer.dims, dtype=layer.dtype)

        def attend() -> torch.Tensor:
            plan = triton_mla.plan_mla(metadata, layer.dims)
            return plan.attend(inputs.query, inputs.rope, weights, inputs.kv, scale=0.1)

        attend()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attend()
        for lengths in ([1500, 2, 700, 64, 65], [5, 1499, 128, 129, 3]):
            metadata.context_len.copy_(torch.tensor(lengths, dtype=torch.int32))
            poison()
            graph.replay()
            exact = replace(metadata, context_len=metadata.context_len.clone(), context_len_cpu=tuple(lengths))
            assert_close(output, reference(layer, exact, inputs, None), ERROR[layer.dtype])


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    rope: torch.Tensor
    latent: torch.Tensor
    key: torch.Tensor
    norm: LatentNorm
    rotation: Rotation
    up: torch.Tensor
    kv: KvLayerCache


def check(layer: Layer, rows: list[tuple[int, int]], is_sparse: bool) -> None:
    metadata = make_metadata(rows, layer.block_size)
    inputs = make_inputs(layer, metadata)
    plan = triton_mla.plan_mla(metadata, layer.dims)
    wide = replace(inputs, kv=replace(inputs.kv, key=inputs.kv.key.clone()), rope=inputs.rope.clone())
    rope = plan.store(
        inputs.latent,
        inputs.key,
        inputs.rope,
        inputs.kv,
        norm=inputs.norm,
        rotation=inputs.rotation,
        is_interleaved=layer.is_interleaved,
    )
    expected_rope = torch_ref.plan_mla(metadata, layer.dims).store(
        wide.latent,
        wide.key,
        wide.rope,
        wide.kv,
        norm=wide.norm,
        rotation=wide.rotation,
        is_interleaved=layer.is_interleaved,
    )
    assert_close(rope, expected_rope, ERROR[layer.dtype])
    assert torch.equal(inputs.kv.key.float().isnan(), wide.kv.key.float().isnan()), "written where it should not"
    cached, expected_cached = (kv.key.float().nan_to_num() for kv in (inputs.kv, wide.kv))
    # Where the reference rounds between scaling and eight bits, it rounds once more.
    assert_close(cached, expected_cached, 0.02 if layer.is_narrow else ERROR[layer.dtype])
    selected = select_at_random(metadata, 200) if is_sparse else None
    weights = triton_mla.prepare_latent_weights(inputs.up, layer.dims, dtype=layer.dtype)
    poison()
    output = plan.attend(inputs.query, rope, weights, inputs.kv, scale=0.1, selected_TK=selected)
    assert output.is_contiguous() and output.dtype == layer.dtype
    assert_close(output, reference(layer, metadata, replace(inputs, rope=rope), selected), ERROR[layer.dtype])


def reference(layer: Layer, metadata: AttentionMetadata, inputs: Inputs, selected: torch.Tensor | None) -> torch.Tensor:
    weights = torch_ref.prepare_latent_weights(inputs.up.float(), layer.dims, dtype=torch.float32)
    plan = torch_ref.plan_mla(metadata, layer.dims)
    return plan.attend(inputs.query.float(), inputs.rope.float(), weights, inputs.kv, scale=0.1, selected_TK=selected)


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"relative error {error:.2e}"


def poison() -> None:
    """What torch.empty returns next holds NaN."""
    blocks = [torch.full((1 << size,), float("nan"), device="cuda") for size in (12, 16, 20, 24, 26)]
    del blocks


def make_metadata(rows: list[tuple[int, int]], block_size: int) -> AttentionMetadata:
    counts = [ceil_div(context_len, block_size) for context_len, _ in rows]
    ids = (1 + torch.randperm(sum(counts), device="cuda")).int().split(counts)
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32, device="cuda")
    starts, slots = [0], []
    for row, (context_len, num_new) in enumerate(rows):
        table[row, : counts[row]] = ids[row]
        position = torch.arange(context_len - num_new, context_len, device="cuda")
        slots.append(ids[row][position // block_size].long() * block_size + position % block_size)
        starts.append(starts[-1] + num_new)
    return AttentionMetadata(
        block_size=block_size,
        num_decode_rows=next((row for row, (_, num_new) in enumerate(rows) if num_new > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32, device="cuda"),
        block_table=table,
        slot=torch.cat(slots),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(context_len for context_len, _ in rows),
    )


def make_inputs(layer: Layer, metadata: AttentionMetadata) -> Inputs:
    """Pages that no row has, and what is behind a row's end, hold NaN."""
    dims, dtype, num_tokens = layer.dims, layer.dtype, metadata.query_start_cpu[-1]
    stored = float8_dtype_of(detect_platform("auto")) if layer.is_narrow else dtype
    num_pages, stored_dim = int(metadata.block_table.max()) + 2, dims.latent_dim + dims.rope_dim
    memory = torch.randn(num_pages, 3, layer.block_size, 1, stored_dim, device="cuda")
    for row, length in enumerate(metadata.context_len_cpu):
        memory[
            metadata.block_table[row, (length - 1) // layer.block_size], :, (length - 1) % layer.block_size + 1 :
        ] = float("nan")
    memory[0] = memory[-1] = float("nan")
    memory = memory.to(stored)
    query = torch.randn(num_tokens, dims.num_heads, dims.nope_dim + dims.rope_dim, device="cuda").to(dtype)
    fused = torch.randn(num_tokens, 24 + stored_dim, device="cuda").to(dtype)
    angle = torch.randn(num_tokens, 1, dims.rope_dim // 2, device="cuda") * 3
    up = torch.randn(dims.num_heads, dims.nope_dim + dims.value_dim, dims.latent_dim, device="cuda")
    return Inputs(
        query=query[..., : dims.nope_dim],
        rope=query[..., dims.nope_dim :],
        latent=fused[:, 24 : 24 + dims.latent_dim],
        key=fused[:, 24 + dims.latent_dim :],
        norm=LatentNorm((1 + 0.2 * torch.randn(dims.latent_dim, device="cuda")).to(dtype), 1e-5),
        rotation=Rotation(torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)),
        up=(up * dims.latent_dim**-0.5).to(dtype),
        kv=KvLayerCache(memory[:, 1], memory[:, 1, ..., :0], key_scale=0.7 if layer.is_narrow else 1.0),
    )


def select_at_random(metadata: AttentionMetadata, num_selected: int) -> torch.Tensor:
    """Some of what each token sees; all of it where that is little."""
    selected = torch.full((metadata.query_start_cpu[-1], num_selected), -1, dtype=torch.int32)
    starts = metadata.query_start_cpu
    for start, end, context_len in zip(starts, starts[1:], metadata.context_len_cpu):
        for token in range(start, end):
            chosen = torch.randperm(context_len - end + token + 1)[:num_selected]
            selected[token, : len(chosen)] = chosen.int()
    return selected.cuda()
