"""Every backend's attention is dense attention over the keys that each token sees, whatever rows a step has."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.attention import AttentionMetadata, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from atom_cluster.units import ceil_div

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
BACKENDS = ["torch", "cpu", "triton"]
BLOCK_SIZE = 4
NUM_HEADS = 6
KEY_DIM, VALUE_DIM = 16, 8
SCALE = 0.3

Rows = list[tuple[int, int]]
"""(tokens of the row including this step's, of which new), rows with one new token first."""

STEPS: dict[str, Rows] = {
    "one decode row": [(9, 1)],
    "decode rows of similar lengths": [(9, 1), (12, 1), (7, 1)],
    "decode rows of very different lengths": [(1, 1), (90, 1), (5, 1), (33, 1), (2, 1)],
    "more decode tokens than one group takes": [(1500, 1), (1400, 1), (1300, 1), (1450, 1)],
    "drafts of equal length": [(9, 3), (3, 3), (21, 3)],
    "decodes and drafts of several lengths": [(9, 1), (40, 1), (17, 2), (30, 5), (5, 5), (33, 2)],
    "a whole prompt": [(13, 13)],
    "a prompt of several tiles": [(600, 600)],
    "a chunk behind cached tokens, across tiles": [(700, 300)],
    "decodes, chunks and a last chunk of one token": [(9, 1), (40, 1), (17, 5), (8, 8), (30, 11), (21, 1)],
}


@dataclass(frozen=True)
class Layer:
    """What a step is computed on: the options of one layer."""

    dtype: torch.dtype = torch.float32
    num_kv_heads: int = 3
    window: int | None = None
    has_sinks: bool = False
    stored: torch.dtype | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def skip_interpreted(backend: str, *, unless: bool) -> None:
    """Interpreted kernels are slow: of cases that are much alike they take some."""
    if backend == "triton" and not unless:
        pytest.skip("slow in the interpreter")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_all_positions(backend: str, name: str, num_kv_heads: int, dtype: torch.dtype) -> None:
    skip_interpreted(backend, unless=num_kv_heads == 3 and "more" not in name)
    check(backend, STEPS[name], Layer(dtype, num_kv_heads))


@pytest.mark.parametrize("window", [1, 3, 4, 5, 16, 2000])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_windows(backend: str, name: str, window: int, has_sinks: bool) -> None:
    skip_interpreted(backend, unless=window in (5, 16) and has_sinks and "decode" in name and "more" not in name)
    check(backend, STEPS[name], Layer(window=window, has_sinks=has_sinks))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", STEPS)
def test_sinks(backend: str, name: str, dtype: torch.dtype) -> None:
    skip_interpreted(backend, unless=name in ("one decode row", "a whole prompt"))
    check(backend, STEPS[name], Layer(dtype, num_kv_heads=2, has_sinks=True))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.02, 3.0)])
def test_narrow_memory(backend: str, stored: torch.dtype, window: int | None, scales: tuple[float, float]) -> None:
    if backend == "triton" and stored != torch.bfloat16:
        pytest.skip("the interpreter does not round to eight bits, or has them not")
    layer = Layer(window=window, has_sinks=True, stored=stored, key_scale=scales[0], value_scale=scales[1])
    for name in ("one decode row", "decodes, chunks and a last chunk of one token"):
        check(backend, STEPS[name], layer)


@pytest.mark.parametrize("seed", range(25))
def test_random_steps(backend: str, seed: int) -> None:
    skip_interpreted(backend, unless=seed < 8)
    draw = random.Random(seed)
    rows = [(draw.randint(1, 60), 1) for _ in range(draw.randint(0, 6))]
    for _ in range(draw.randint(0 if rows else 1, 5)):
        num_new = draw.choice([1, 2, 3, 4, 5, 9, 20])
        rows.append((num_new + draw.choice([0, draw.randint(0, 50)]), num_new))
    window = draw.choice([None, draw.randint(1, 12), draw.randint(13, 70)])
    check(backend, rows, Layer(num_kv_heads=draw.choice([1, 2, 6]), window=window, has_sinks=draw.random() < 0.5))


def test_values_beyond_eight_bits_are_saturated(backend: str) -> None:
    metadata, _ = scattered_rows([(1, 1)], None)
    kv, _ = strided_cache(2, Layer(stored=torch.float8_e4m3fn))
    plan = plan_of(backend, metadata, torch.float32)
    value = torch.full((1, 3, VALUE_DIM), -1e6)
    query = plan.store(torch.zeros(1, NUM_HEADS, KEY_DIM), torch.zeros(1, 3, KEY_DIM), value, kv)
    output = plan.attend(query, kv, scale=1.0)
    assert (output == -448).all()


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 6, 16])
def test_store_norms_and_rotates_views(backend: str, rotary_dim: int, has_norms: bool) -> None:
    """Of a projection with more in it; keys are what is stored, values stay."""
    metadata, blocks = scattered_rows([(9, 1), (5, 4)], None)
    kv, _ = strided_cache(1 + sum(map(len, blocks)), Layer())
    fused = randn(5, NUM_HEADS * KEY_DIM + 3 * (KEY_DIM + VALUE_DIM) + 5, seed=1)
    query, key, value, _ = fused.float().split([NUM_HEADS * KEY_DIM, 3 * KEY_DIM, 3 * VALUE_DIM, 5], dim=-1)
    views = query.view(5, NUM_HEADS, KEY_DIM), key.view(5, 3, KEY_DIM), value.view(5, 3, VALUE_DIM)
    weights, angle = 1 + randn(2, KEY_DIM, seed=2), randn(5, 1, rotary_dim // 2, seed=3) * 5
    expected = []
    for x, weight in zip(views, weights):
        wide = x.double()
        if has_norms:
            wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        first, second, rest = wide.split([rotary_dim // 2, rotary_dim // 2, KEY_DIM - rotary_dim], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        expected.append(torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).float())
    expected_value = views[2].clone()
    norms = HeadNorms(*weights.float(), 1e-5) if has_norms else None
    angles = torch.cat((angle.cos(),) * 2, -1).float(), torch.cat((-angle.sin(), angle.sin()), -1).float()
    rotation = Rotation(*angles) if rotary_dim else None
    found = plan_of(backend, metadata, torch.float32).store(*views, kv, norms=norms, rotation=rotation)
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
    slot = metadata.slot
    torch.testing.assert_close(kv.key[slot // BLOCK_SIZE, slot % BLOCK_SIZE], expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(kv.value[slot // BLOCK_SIZE, slot % BLOCK_SIZE], expected_value)


def test_sinks_far_above_and_below_all_scores(backend: str) -> None:
    metadata, _ = scattered_rows([(9, 1), (40, 20)], None)
    kv, _ = strided_cache(14, Layer())
    plan, query = plan_of(backend, metadata, torch.float32), randn(21, NUM_HEADS, KEY_DIM, seed=1).float()
    sinks = torch.tensor([1e4, -1e4]).repeat(NUM_HEADS // 2)
    output, plain = plan.attend(query, kv, scale=SCALE, sink_H=sinks), plan.attend(query, kv, scale=SCALE)
    assert (output[:, ::2] == 0).all()
    torch.testing.assert_close(output[:, 1::2], plain[:, 1::2])


@pytest.mark.parametrize("window", [None, 1, 7])
def test_the_device_decides_how_long_rows_are(window: int | None) -> None:
    """On devices the host may know more tokens than a row has, by some of this block and the next."""
    metadata, blocks = scattered_rows([(9, 1), (4, 1), (40, 1)], window)
    kv, _ = strided_cache(1 + sum(map(len, blocks)), Layer())
    longer = replace(
        metadata, context_len_cpu=(12, 7, 45), block_table=torch.nn.functional.pad(metadata.block_table, (0, 2))
    )
    query = randn(3, NUM_HEADS, KEY_DIM, seed=1).float()
    found, expected = (
        plan_of("torch", rows, torch.float32).attend(query, kv, scale=SCALE) for rows in (longer, metadata)
    )
    torch.testing.assert_close(found, expected)


def check(backend: str, rows: Rows, layer: Layer) -> None:
    """Store and attend, and compare with dense attention in float64 over what memory holds."""
    metadata, blocks = scattered_rows(rows, layer.window)
    num_tokens, dtype = metadata.query_start_cpu[-1], layer.dtype
    kv, memory = strided_cache(1 + sum(map(len, blocks)), layer)
    untouched = memory.clone()
    query = randn(num_tokens, NUM_HEADS, KEY_DIM, seed=1).to(dtype)
    key = randn(num_tokens, layer.num_kv_heads, KEY_DIM, seed=2).to(dtype)
    value = randn(num_tokens, layer.num_kv_heads, VALUE_DIM, seed=3).to(dtype)
    sinks = randn(NUM_HEADS, seed=6).float() * 3 if layer.has_sinks else None
    plan = plan_of(backend, metadata, dtype)
    torch.testing.assert_close(plan.store(query, key, value, kv), query)
    num_written = (memory.view(torch.uint8) != untouched.view(torch.uint8)).any(0).sum()
    assert num_written <= memory.shape[1] * memory.dtype.itemsize / 3, "only the layer is written"
    stored = [
        torch.cat([kv.key.double() * layer.key_scale, kv.value.double() * layer.value_scale], -1)[i] for i in blocks
    ]
    output = plan.attend(query, kv, scale=SCALE, sink_H=sinks)
    assert output.is_contiguous() and output.dtype == dtype
    for row, (context_len, num_new) in enumerate(rows):
        tokens = slice(*metadata.query_start_cpu[row : row + 2])
        past = stored[row].flatten(0, 1)[:context_len]
        new = torch.cat((key[tokens], value[tokens]), -1).double()
        coarse = 0.13 if memory.dtype.itemsize == 1 else 0.01
        torch.testing.assert_close(past[-num_new:], new, atol=0.05 if memory.dtype != dtype else 0, rtol=coarse)
        expected = dense_attention(query[tokens].double(), *past.split([KEY_DIM, VALUE_DIM], -1), layer.window, sinks)
        torch.testing.assert_close(output[tokens].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def dense_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    output = torch.empty(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    for index in range(len(query)):
        position = len(keys) - len(query) + index
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        for head in range(query.shape[1]):
            weights = (keys[seen, head // group] @ query[index, head] * SCALE).exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            output[index, head] = weights @ values[seen, head // group] / total
    return output


def plan_of(backend: str, metadata: AttentionMetadata, dtype: torch.dtype) -> object:
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("interpreted kernels compute in float32")
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype).plan_attention(metadata)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strided_cache(num_blocks: int, layer: Layer) -> tuple[KvLayerCache, torch.Tensor]:
    """The second of three layers of a block-major memory, filled with old values; key and value dims differ."""
    per_layer = BLOCK_SIZE * layer.num_kv_heads * (KEY_DIM + VALUE_DIM)
    memory = randn(num_blocks, 3 * per_layer, seed=4).to(layer.stored or layer.dtype)
    num_key_numbers = BLOCK_SIZE * layer.num_kv_heads * KEY_DIM
    key = memory[:, per_layer : per_layer + num_key_numbers]
    value = memory[:, per_layer + num_key_numbers : 2 * per_layer]
    shape = (num_blocks, BLOCK_SIZE, layer.num_kv_heads)
    cache = KvLayerCache(key.view(*shape, KEY_DIM), value.view(*shape, VALUE_DIM), layer.key_scale, layer.value_scale)
    return cache, memory


def scattered_rows(rows: Rows, window: int | None) -> tuple[AttentionMetadata, list[torch.Tensor]]:
    """A step's metadata, and each row's blocks. What the table says of blocks behind a window is wrong."""
    counts = [ceil_div(context_len, BLOCK_SIZE) for context_len, _ in rows]
    ids = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))).split(counts)
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    slots: list[int] = []
    starts = [0]
    for row, (context_len, num_new) in enumerate(rows):
        table[row, : counts[row]] = ids[row]
        if window is not None:
            table[row, : max(0, context_len - num_new - window + 1) // BLOCK_SIZE] = 0
        positions = range(context_len - num_new, context_len)
        slots += [int(ids[row][p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        starts.append(starts[-1] + num_new)
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE,
        window=window,
        num_decode_rows=next((i for i, (_, num_new) in enumerate(rows) if num_new > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32),
        block_table=table,
        slot=torch.tensor(slots),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(context_len for context_len, _ in rows),
    )
    return metadata, list(ids)
