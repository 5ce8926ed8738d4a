"""On a GPU: attention and what comes before it are the reference's in float64, whatever dims, dtypes and rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import AttentionMetadata, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.select import float8_dtype_of
from atom_cluster.platform.detect import detect_platform
from atom_cluster.units import ceil_div

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Norm of the difference over the norm, of what attention returns."""


@dataclass(frozen=True)
class Layer:
    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 128
    value_dim: int = 128
    window: int | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.bfloat16
    is_narrow: bool = False
    block_size: int = 16


LAYERS = {
    "llama": Layer(),
    "llama float32": Layer(dtype=torch.float32),
    "llama fp8": Layer(is_narrow=True),
    "llama float16": Layer(dtype=torch.float16),
    "llama float16 fp8": Layer(dtype=torch.float16, is_narrow=True, block_size=32),
    "llama float32 fp8": Layer(dtype=torch.float32, is_narrow=True),
    "qwen2.5 7b": Layer(28, 4),
    "qwen3 30b, pages of 64": Layer(32, 4, block_size=64),
    "one kv head": Layer(71, 1, 64, 64),
    "as many kv heads": Layer(3, 3, 96, 96, block_size=8),
    "gpt-oss": Layer(64, 8, 64, 64, window=128, has_sinks=True),
    "gpt-oss fp8": Layer(64, 8, 64, 64, window=128, has_sinks=True, is_narrow=True),
    "gpt-oss float32 fp8": Layer(16, 2, 64, 64, window=128, has_sinks=True, dtype=torch.float32, is_narrow=True),
    "sinks": Layer(64, 8, 64, 64, has_sinks=True),
    "wide window": Layer(16, 4, window=1000, has_sinks=True, block_size=32),
    "gemma3": Layer(8, 4, 256, 256, window=512),
    "gemma3 fp8": Layer(8, 4, 256, 256, is_narrow=True),
    "mimo": Layer(16, 2, 192, 128, window=100, has_sinks=True),
    "tiny": Layer(4, 2, 16, 8, window=5, dtype=torch.float32, block_size=8),
    "tiny fp8": Layer(4, 1, 24, 16, is_narrow=True, block_size=8),
    "deepseek v4 window": Layer(64, 1, 512, 512, window=128, has_sinks=True),
}

STEPS = {
    "one": [(700, 1)],
    "decode": [(1, 1), (17, 1), (16, 1), (3000, 1), (129, 1), (64, 1)],
    "drafts": [(4, 4), (900, 4), (130, 4)],
    "mixed": [(9, 1), (500, 1), (300, 5), (8, 8), (9, 9), (333, 200), (131, 131), (77, 1), (1, 1)],
    "prompt": [(1000, 1000)],
    "chunks": [(700, 1), (4000, 300), (2048, 1024), (2500, 20), (640, 640), (5000, 130)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LAYERS)
def test_steps(name: str, step: str) -> None:
    check(LAYERS[name], STEPS[step], seed=1)


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.randint(1, 2000), 1) for _ in range(draw.randint(0, 40))]
    for _ in range(draw.randint(0 if rows else 1, 5)):
        num_new = draw.choice([1, 2, 3, 8, 9, 33, 128, 300])
        rows.append((num_new + draw.choice([0, draw.randint(0, 700)]), num_new))
    check(LAYERS[draw.choice(list(LAYERS))], rows, seed=seed)


@pytest.mark.parametrize("name", ["llama", "llama fp8"])
def test_many_rows(name: str) -> None:
    draw = random.Random(1)
    check(LAYERS[name], [(draw.randint(1, 300), 1) for _ in range(700)], seed=1)


def test_a_long_row_among_short_ones() -> None:
    for name in ("llama", "llama fp8", "gemma3 fp8"):
        check(LAYERS[name], [(100, 1), (70000, 1), (5, 1)], seed=1)


@pytest.mark.parametrize("step", ["mixed", "chunks"])
@pytest.mark.parametrize("name", ["llama", "llama fp8", "gemma3", "wide window"])
def test_a_plan_serves_layer_after_layer(name: str, step: str) -> None:
    """Whose memories differ in where they are; one's in strides and scales as well."""
    layer = LAYERS[name]
    metadata, kv, query = inputs_of(layer, STEPS[step], seed=1)
    key, value = (x.float().nan_to_num() for x in (kv.key, kv.value))
    first = replace(kv, key=key.to(kv.key.dtype), value=value.to(kv.key.dtype))
    other = replace(kv, key=key.flip(3).to(kv.key.dtype), value=value.flip(3).to(kv.key.dtype))
    apart = replace(kv, key=spread(other.key), value=spread(other.value), value_scale=kv.value_scale * 3)
    plan = kernels().plan_attention(metadata)
    sinks = torch.randn(layer.num_heads, device="cuda") * 2 if layer.has_sinks else None
    for kv in (first, other, apart, other):
        query = query.flip(0).contiguous()
        poison()
        output = plan.attend(query, kv, scale=0.1, sink_H=sinks)
        assert_close(output, reference(metadata, kv, query, 0.1, sinks), layer.dtype)


def test_a_captured_step_serves_other_lengths() -> None:
    layer = LAYERS["llama"]
    long, short = [(900, 2), (300, 2), (20, 2)], [(2, 2), (450, 2), (700, 2)]
    metadata, kv, query = inputs_of(layer, long, seed=1)
    kv = replace(kv, key=kv.key.nan_to_num(), value=kv.value.nan_to_num())
    other, _, _ = inputs_of(layer, short, seed=1)
    table = torch.zeros_like(metadata.block_table)
    table[:, : other.block_table.shape[1]] = other.block_table
    static = replace(metadata, context_len_cpu=(900,) * 3)
    kernels().plan_attention(static).attend(query, kv, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernels().plan_attention(static).attend(query, kv, scale=0.1)
    for lengths, pages in ((metadata.context_len.clone(), metadata.block_table.clone()), (other.context_len, table)):
        static.context_len.copy_(lengths)
        static.block_table.copy_(pages)
        for _ in range(3):
            output.fill_(float("nan"))
            graph.replay()
        exact = replace(static, context_len_cpu=tuple(lengths.tolist()))
        assert_close(output, reference(exact, kv, query, 0.1, None), torch.bfloat16)


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_store(dtype: torch.dtype, rotary_dim: int, has_norms: bool, is_narrow: bool) -> None:
    layer = Layer(num_heads=12, num_kv_heads=3, value_dim=64, dtype=dtype, is_narrow=is_narrow)
    metadata, kv, _ = inputs_of(layer, [(9, 1), (300, 200), (5, 5)], seed=1)
    num_tokens = metadata.query_start_cpu[-1]
    fused = torch.randn(num_tokens, 15 * 128 + 3 * 64 + 8, device="cuda").to(dtype)
    query, key, value, _ = fused.split([12 * 128, 3 * 128, 3 * 64, 8], dim=-1)
    heads = query.view(num_tokens, 12, 128), key.view(num_tokens, 3, 128), value.view(num_tokens, 3, 64)
    norms = rotation = None
    if has_norms:
        norms = HeadNorms(*(1 + torch.randn(2, 128, device="cuda")).to(dtype), 1e-6)
    if rotary_dim:
        angle = torch.randn(num_tokens, 1, rotary_dim // 2, device="cuda") * 9
        sin = angle.sin()
        rotation = Rotation(torch.cat((angle.cos(),) * 2, -1), torch.cat((-sin, sin), -1))
    expected_kv = replace(kv, key=kv.key.clone(), value=kv.value.clone())
    plan = torch_ref.plan_attention(metadata)
    expected = plan.store(*(x.clone() for x in heads), expected_kv, norms=norms, rotation=rotation)
    poison()
    found = kernels().plan_attention(metadata).store(*heads, kv, norms=norms, rotation=rotation)
    # Roundings differ at most: where the reference rounds between scaling and eight bits, they do more often.
    error = 0.02 if is_narrow else ERROR[dtype]
    assert relative_error(found, expected) < ERROR[dtype]
    for stored, wanted in ((kv.key, expected_kv.key), (kv.value, expected_kv.value)):
        assert torch.equal(stored.float().isnan(), wanted.float().isnan()), "written where it should not"
        assert relative_error(stored.float().nan_to_num(), wanted.float().nan_to_num()) < error


def check(layer: Layer, rows: list[tuple[int, int]], *, seed: int) -> None:
    metadata, kv, query = inputs_of(layer, rows, seed=seed)
    sinks = torch.randn(layer.num_heads, device="cuda") * 2 if layer.has_sinks else None
    poison()
    output = kernels().plan_attention(metadata).attend(query, kv, scale=layer.dim**-0.5, sink_H=sinks)
    assert_close(output, reference(metadata, kv, query, layer.dim**-0.5, sinks), layer.dtype)


def reference(
    metadata: AttentionMetadata, kv: KvLayerCache, query: torch.Tensor, scale: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    wide = None if sinks is None else sinks.double()
    known = replace(kv, key=kv.key.double().nan_to_num(), value=kv.value.double().nan_to_num())
    return torch_ref.plan_attention(metadata).attend(query.double(), known, scale=scale, sink_H=wide)


def assert_close(output: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert output.dtype == dtype and output.is_contiguous()
    per_token = (output.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert per_token.max() < 2 * ERROR[dtype], f"token {per_token.argmax()}: {per_token.max()}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found.double() - expected.double()).norm() / expected.double().norm()


def spread(paged: torch.Tensor) -> torch.Tensor:
    """The same, with room between pages."""
    wide = torch.full((len(paged), 2, *paged.shape[1:]), float("nan"), device="cuda").to(paged.dtype)
    wide[:, 1] = paged
    return wide[:, 1]


def poison() -> None:
    """What torch.empty returns next is not a number."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 8, 1 << 12, 1 << 18, 1 << 20, 1 << 24)]
    del blocks


def kernels() -> object:
    from atom_cluster.ops import triton

    return triton


def inputs_of(
    layer: Layer, rows: list[tuple[int, int]], *, seed: int
) -> tuple[AttentionMetadata, KvLayerCache, torch.Tensor]:
    """Pages of one of three layers; there are numbers only where rows have keys that some query sees."""
    torch.manual_seed(seed)
    size, width = layer.block_size, max(context_len for context_len, _ in rows) // layer.block_size + 3
    counts = [ceil_div(context_len, size) for context_len, _ in rows]
    num_pages = sum(counts) + 1
    stored = float8_dtype_of(detect_platform()) if layer.is_narrow else layer.dtype
    shape = (num_pages, 3, size, layer.num_kv_heads)
    key = torch.full((*shape, layer.dim), float("nan"), device="cuda", dtype=torch.float32)[:, 1]
    value = torch.full((*shape, layer.value_dim), float("nan"), device="cuda", dtype=torch.float32)[:, 1]
    ids = (1 + torch.randperm(num_pages - 1)).split(counts)
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    starts, slots = [0], []
    for row, (context_len, num_new) in enumerate(rows):
        table[row, : counts[row]] = ids[row]
        position = torch.arange(context_len)
        slot = ids[row][position // size] * size + position % size
        slots.append(slot[-num_new:])
        first = 0 if layer.window is None else max(0, context_len - num_new - layer.window + 1)
        page, entry = slot[first:].cuda() // size, slot[first:].cuda() % size
        key[page, entry] = torch.randn(len(page), layer.num_kv_heads, layer.dim, device="cuda")
        value[page, entry] = torch.randn(len(page), layer.num_kv_heads, layer.value_dim, device="cuda")
        starts.append(starts[-1] + num_new)
    metadata = AttentionMetadata(
        block_size=size,
        window=layer.window,
        num_decode_rows=next((i for i, (_, num_new) in enumerate(rows) if num_new > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32, device="cuda"),
        block_table=table.cuda(),
        slot=torch.cat(slots).cuda(),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(context_len for context_len, _ in rows),
    )
    scales = (0.5, 2.0) if layer.is_narrow else (1.0, 1.0)
    query = torch.randn(starts[-1], layer.num_heads, layer.dim, device="cuda").to(layer.dtype)
    return metadata, KvLayerCache(key.to(stored), value.to(stored), *scales), query
