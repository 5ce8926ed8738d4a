"""Every backend computes what the contract of each op says; the reference is written out here in float64."""

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform
from atom_cluster.units import ceil_div

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE]
BLOCK_SIZE = 4


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(case: tuple[OpTable, torch.dtype], stored: torch.dtype, has_bias: bool) -> None:
    ops, dtype = case
    x, weight = randn(5, 24, dtype=dtype), (randn(9, 24, dtype=dtype, seed=1) * 0.1).to(stored)
    bias = randn(9, dtype=dtype, seed=2) if has_bias else None
    before = weight.clone()
    y = ops.prepare_linear(weight, bias, dtype=dtype)(x)
    expected = x.double() @ weight.to(dtype).double().T + (0 if bias is None else bias.double())
    assert_matches(y, expected, dtype)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
def test_rms_norm(case: tuple[OpTable, torch.dtype], shape: tuple[int, ...]) -> None:
    ops, dtype = case
    x, weight = randn(*shape, dtype=dtype) * 3, randn(24, dtype=dtype, seed=1)
    assert_matches(ops.rms_norm(x, weight, 1e-5), norm_in_float64(x, weight), dtype)


def test_add_rms_norm(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    x, residual, weight = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(7, 24), (7, 24), (24,)]))
    total = (x + residual).clone()
    normed, new_residual = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    assert_matches(normed, norm_in_float64(total, weight), dtype)


def norm_in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_rotary_turns_pairs_of_halves(case: tuple[OpTable, torch.dtype], rotary_dim: int) -> None:
    ops, dtype = case
    angle = randn(5, 1, rotary_dim // 2, dtype=torch.promote_types(dtype, torch.float32), seed=9) * 5
    cos, sin = angle.cos(), angle.sin()
    fused = randn(5, 5, 8, dtype=dtype)
    query, key = fused[:, :3], fused[:, 3:]
    expected = [turned(heads, angle.double()) for heads in (query, key)]
    found = ops.rotary(query, key, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    for actual, wanted in zip(found, expected):
        assert_matches(actual, wanted, dtype)


def turned(heads: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Each pair as a complex number, times e^(i angle)."""
    half = angle.shape[-1]
    first, second, rest = heads.double().split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    pair = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pair.real, pair.imag, rest), dim=-1)


def test_silu_and_mul(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    gate_up = randn(4, 12, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_matches(ops.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


# (tokens of the row including this step's, of which new), rows with one new token first.
STEPS = {
    "one decode row": [(9, 1)],
    "decode rows of similar lengths": [(9, 1), (12, 1), (7, 1)],
    "decode rows of very different lengths": [(1, 1), (90, 1), (5, 1), (33, 1), (2, 1)],
    "more decode tokens than one group takes": [(1500, 1), (1400, 1), (1300, 1), (1450, 1)],
    "a whole prompt": [(13, 13)],
    "a prompt of several tiles": [(600, 600)],
    "a chunk behind cached tokens, across tiles": [(700, 300)],
    "decodes, chunks and a last chunk of one token": [(9, 1), (40, 1), (17, 5), (8, 8), (21, 1)],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_attention(case: tuple[OpTable, torch.dtype], name: str, num_kv_heads: int) -> None:
    ops, dtype = case
    rows = STEPS[name]
    metadata, blocks = scattered_rows(rows)
    num_tokens = metadata.query_start_cpu[-1]
    kv, memory = strided_cache(1 + sum(map(len, blocks)), num_kv_heads, dtype)
    history = [kv.key[torch.tensor(ids)].flatten(0, 1) for ids in blocks]
    values = [kv.value[torch.tensor(ids)].flatten(0, 1) for ids in blocks]
    untouched = memory.clone()
    query, key = randn(num_tokens, 6, 16, dtype=dtype, seed=1), randn(num_tokens, num_kv_heads, 16, dtype=dtype, seed=2)
    value = randn(num_tokens, num_kv_heads, 8, dtype=dtype, seed=3)
    plan = ops.plan_attention(metadata)
    plan.store(key, value, kv)
    assert (memory != untouched).sum() <= num_tokens * num_kv_heads * 24, "only the step's slots are written"
    output = plan.attend(query, kv, scale=0.3)
    assert output.is_contiguous()
    for row, (context_len, num_new) in enumerate(rows):
        tokens = slice(*metadata.query_start_cpu[row : row + 2])
        past = context_len - num_new
        keys, vals = torch.cat((history[row][:past], key[tokens])), torch.cat((values[row][:past], value[tokens]))
        assert_matches(output[tokens], attention_in_float64(query[tokens], keys, vals), dtype)


def attention_in_float64(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    past = len(keys) - len(query)
    keys, values = keys.double(), values.double()
    output = torch.empty(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ keys[:, head // group].T * 0.3
        hidden = torch.arange(len(keys))[None] > past + torch.arange(len(query))[:, None]
        output[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:, head // group]
    return output


def strided_cache(num_blocks: int, num_kv_heads: int, dtype: torch.dtype) -> tuple[KvLayerCache, torch.Tensor]:
    """The second of three layers of a block-major memory, filled with old values; key and value dims differ."""
    per_layer = BLOCK_SIZE * num_kv_heads * 24
    memory = randn(num_blocks, 3 * per_layer, dtype=dtype, seed=4)
    layer = memory[:, per_layer : 2 * per_layer]
    key, value = layer.split([per_layer // 3 * 2, per_layer // 3], dim=1)
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads)
    return KvLayerCache(key.view(*shape, 16), value.view(*shape, 8)), memory


def scattered_rows(rows: list[tuple[int, int]]) -> tuple[AttentionMetadata, list[list[int]]]:
    counts = [ceil_div(context_len, BLOCK_SIZE) for context_len, _ in rows]
    ids = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))).tolist()
    blocks = [[ids.pop() for _ in range(count)] for count in counts]
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    slots, starts = [], [0]
    for row, (context_len, num_new) in enumerate(rows):
        table[row, : counts[row]] = torch.tensor(blocks[row])
        positions = range(context_len - num_new, context_len)
        slots += [blocks[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        starts.append(starts[-1] + num_new)
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE,
        num_decode_rows=next((i for i, (_, num_new) in enumerate(rows) if num_new > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([context_len for context_len, _ in rows], dtype=torch.int32),
        block_table=table,
        slot=torch.tensor(slots),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(context_len for context_len, _ in rows),
    )
    return metadata, blocks
