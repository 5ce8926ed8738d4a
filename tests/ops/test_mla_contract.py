"""Every backend's latent attention and sparse index, against both written out densely in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.cpu import mla as cpu_mla
from atom_cluster.ops.mla import LatentNorm, MlaDims
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.ops.torch_ref import sparse_index
from atom_cluster.platform.detect import detect_platform
from tests.ops.test_attention_contract import BLOCK_SIZE, STEPS, Rows, randn, scattered_rows
from tests.ops.test_contracts import norm_in_float64, turned

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}
BACKENDS = ["torch", "cpu"]
CASES = [(backend, dtype) for backend in BACKENDS for dtype in TOLERANCE] + [("triton", torch.float32)]
SLOW_TO_INTERPRET = {
    "more decode tokens than one group takes",
    "a prompt of several tiles",
    "a chunk behind cached tokens, across tiles",
}
DIMS = MlaDims(num_heads=3, latent_dim=12, nope_dim=7, rope_dim=4, value_dim=5)
STORED_DIM = DIMS.latent_dim + DIMS.rope_dim
NUM_SELECTED = 11
SCALE = 0.4


def ops_of(backend: str, dtype: torch.dtype) -> OpTable:
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype)


def strided_keys(blocks: list[torch.Tensor], dim: int, dtype: torch.dtype) -> KvLayerCache:
    """The second of three layers of a block-major memory, filled with old numbers."""
    num_blocks = 1 + sum(map(len, blocks))
    memory = randn(num_blocks, 3, BLOCK_SIZE, 1, dim, seed=4).to(dtype)
    return KvLayerCache(memory[:, 1], memory[:, 1, ..., :0])


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    backend, dtype = request.param
    return backend, dtype


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_attention_to_what_is_stored(case: tuple[str, torch.dtype], name: str, is_sparse: bool) -> None:
    skip_if_slow(case[0], name)
    check(case[0], STEPS[name], DIMS, case[1], is_sparse=is_sparse)


@pytest.mark.parametrize("latent_dim", [6, 7, 12, 100])
@pytest.mark.parametrize(
    "name", ["a chunk behind cached tokens, across tiles", "decodes and drafts of several lengths"]
)
def test_rows_absorbed_and_expanded_are_equal(name: str, latent_dim: int) -> None:
    """Smaller latents make the absorbed form worthwhile for more queries: for 6 dims always."""
    check("cpu", STEPS[name], replace(DIMS, latent_dim=latent_dim), torch.float64, is_sparse=False)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_tiles_are_joined(monkeypatch: pytest.MonkeyPatch, is_sparse: bool) -> None:
    monkeypatch.setattr(cpu_mla, "MAX_EXPANDED", 1)
    monkeypatch.setattr(cpu_mla, "MAX_GATHERED", NUM_SELECTED * STORED_DIM * 2)
    monkeypatch.setattr(cpu_mla, "MAX_SCORES", 100)
    monkeypatch.setattr(cpu_mla, "TILE_QUERIES", 5)
    rows = [(9, 1), (40, 1), (60, 31), (30, 9), (21, 21)]
    check("cpu", rows, DIMS, torch.float64, is_sparse=is_sparse)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_narrow_memory_holds_scaled_numbers(backend: str, is_sparse: bool) -> None:
    rows = [(9, 1), (40, 1), (33, 20)]
    # In the interpreter, what eight bits round up to a power of two becomes half of it.
    stored = torch.float16 if backend == "triton" else torch.float8_e4m3fn
    check(backend, rows, DIMS, torch.float32, is_sparse=is_sparse, stored=stored, key_scale=0.5)


def test_the_device_decides_how_long_rows_are() -> None:
    """On devices the host may know more tokens than a row has, by some of this block and the next."""
    metadata, blocks = scattered_rows([(9, 1), (13, 1), (40, 1)], None)
    table = torch.nn.functional.pad(metadata.block_table, (0, 2))
    ops, kv = ops_of("torch", torch.float64), strided_keys(blocks, STORED_DIM, torch.float64)
    query, rope = randn(3, 3, DIMS.nope_dim, seed=1), randn(3, 3, DIMS.rope_dim, seed=2)
    weights = ops.prepare_latent_weights(randn(3, 12, 12, seed=7), DIMS, dtype=torch.float64)
    found = []
    for lengths in ((9, 13, 40), (12, 15, 45)):
        rows = replace(metadata, context_len_cpu=lengths, block_table=table)
        index_query, index_weight = randn(3, 4, STORED_DIM, seed=8), randn(3, 4, seed=9)
        selected = ops.plan_index(rows).select(index_query, index_weight, kv, num_selected=NUM_SELECTED)
        assert selected is not None
        plan = ops.plan_mla(rows, DIMS)
        found.append(
            (selected, *(plan.attend(query, rope, weights, kv, scale=SCALE, selected_TK=s) for s in (None, selected)))
        )
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_halves_are_rotated(backend: str) -> None:
    check(backend, [(9, 1), (13, 13)], DIMS, torch.float32, is_sparse=False, is_interleaved=False)


def test_absorbing_is_chosen_where_it_takes_fewer_products() -> None:
    large = MlaDims(num_heads=16, latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert large.max_absorbed_queries == 512 * 256 // 768
    assert replace(large, latent_dim=128).max_absorbed_queries is None


def skip_if_slow(backend: str, name: str) -> None:
    if backend == "triton" and name in SLOW_TO_INTERPRET:
        pytest.skip("takes long in the interpreter; GPUs are tested with such steps")


def check(
    backend: str,
    rows: Rows,
    dims: MlaDims,
    dtype: torch.dtype,
    *,
    is_sparse: bool,
    stored: torch.dtype | None = None,
    key_scale: float = 1.0,
    is_interleaved: bool = True,
) -> None:
    metadata, blocks = scattered_rows(rows, None)
    ops, num_tokens = ops_of(backend, dtype), metadata.query_start_cpu[-1]
    kv = strided_keys(blocks, dims.latent_dim + dims.rope_dim, stored or dtype)
    kv = replace(kv, key_scale=key_scale)
    # As a projection leaves them: heads of both parts side by side.
    both = randn(num_tokens, dims.num_heads, dims.nope_dim + dims.rope_dim, seed=1).to(dtype)
    query, rope = both.split([dims.nope_dim, dims.rope_dim], -1)
    latent, key = (
        randn(num_tokens, dims.latent_dim, seed=3).to(dtype),
        randn(num_tokens, dims.rope_dim, seed=6).to(dtype),
    )
    up = (randn(dims.num_heads, dims.nope_dim + dims.value_dim, dims.latent_dim, seed=7) * 0.3).to(dtype)
    selected = select_at_random(metadata) if is_sparse else None
    plan = ops.plan_mla(metadata, dims)
    before = kv.key.clone()
    weight = (1 + 0.2 * randn(dims.latent_dim, seed=8)).to(dtype)
    angle = randn(num_tokens, 1, dims.rope_dim // 2, seed=9) * 3
    expected_new = torch.cat((norm_in_float64(latent, weight), turned(key[:, None], angle, is_interleaved)[:, 0]), -1)
    expected_rope = turned(rope, angle, is_interleaved)
    wide = torch.promote_types(dtype, torch.float32)
    rotation = Rotation(
        torch.cat((angle.cos(), angle.cos()), -1).to(wide), torch.cat((-angle.sin(), angle.sin()), -1).to(wide)
    )
    norm = LatentNorm(weight, 1e-5)
    rope = plan.store(latent, key, rope, kv, norm=norm, rotation=rotation, is_interleaved=is_interleaved)
    assert rope.dtype == dtype
    torch.testing.assert_close(rope.double(), expected_rope, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (before.float() != kv.key.float()).any(-1).sum() <= num_tokens, "only the step's slots are written"
    weights = ops.prepare_latent_weights(up, dims, dtype=dtype)
    output = plan.attend(query, rope, weights, kv, scale=SCALE, selected_TK=selected)
    assert output.dtype == dtype and output.is_contiguous()
    for row, (context_len, num_new) in enumerate(rows):
        tokens = slice(*metadata.query_start_cpu[row : row + 2])
        past = kv.key[blocks[row]].flatten(0, 2)[:context_len].double() * key_scale
        coarse = {"atol": 0.02, "rtol": 0.07} if stored else {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(past[-num_new:], expected_new[tokens], **coarse)
        sees = torch.ones(num_new, context_len, dtype=torch.bool).tril(context_len - num_new)
        if selected is not None:
            for index, positions in enumerate(selected[tokens].tolist()):
                sees[index] &= torch.tensor([position in positions for position in range(context_len)])
        expected = dense_mla(query[tokens].double(), rope[tokens].double(), past, up.double(), sees, dims)
        torch.testing.assert_close(output[tokens].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def dense_mla(
    query: torch.Tensor, rope: torch.Tensor, past: torch.Tensor, up: torch.Tensor, sees: torch.Tensor, dims: MlaDims
) -> torch.Tensor:
    latent, key = past.split([dims.latent_dim, dims.rope_dim], -1)
    keys = torch.einsum("hnl,cl->chn", up[:, : dims.nope_dim], latent)
    values = torch.einsum("hvl,cl->chv", up[:, dims.nope_dim :], latent)
    scores = (torch.einsum("qhn,chn->hqc", query, keys) + torch.einsum("qhp,cp->hqc", rope, key)) * SCALE
    return torch.einsum("hqc,chv->qhv", scores.masked_fill(~sees, -torch.inf).softmax(-1), values)


def select_at_random(metadata: AttentionMetadata) -> torch.Tensor:
    """Some of what each token sees; all of it where that is little."""
    generator = torch.Generator().manual_seed(8)
    selected = torch.full((metadata.query_start_cpu[-1], NUM_SELECTED), -1, dtype=torch.int32)
    starts = metadata.query_start_cpu
    for start, end, context_len in zip(starts, starts[1:], metadata.context_len_cpu):
        for token in range(start, end):
            num_seen = context_len - end + token + 1
            chosen = torch.randperm(num_seen, generator=generator)[:NUM_SELECTED]
            selected[token, : len(chosen)] = chosen.int()
    return selected


INDEX_HEADS, INDEX_DIM = 5, 6


def test_tiles_of_queries_select_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_index, "MAX_TILE_SCORES", 3 * INDEX_HEADS * 40)
    for name in ("torch", "cpu"):
        check_index(name, [(9, 1), (40, 1), (40, 40), (31, 8)], torch.float64)


@pytest.mark.parametrize("name", STEPS)
def test_the_best_positions_are_selected(case: tuple[str, torch.dtype], name: str) -> None:
    skip_if_slow(case[0], name)
    check_index(case[0], STEPS[name], case[1])


def check_index(backend: str, rows: Rows, dtype: torch.dtype) -> None:
    metadata, blocks = scattered_rows(rows, None)
    num_tokens = metadata.query_start_cpu[-1]
    kv = strided_keys(blocks, INDEX_DIM, dtype)
    query = randn(num_tokens, INDEX_HEADS, INDEX_DIM, seed=1).to(dtype)
    weight = randn(num_tokens, INDEX_HEADS, seed=2).to(torch.promote_types(dtype, torch.float32))
    plan = ops_of(backend, dtype).plan_index(metadata)
    plan.store(randn(num_tokens, INDEX_DIM, seed=3).to(dtype), kv)
    selected = plan.select(query, weight, kv, num_selected=NUM_SELECTED)
    if max(context_len for context_len, _ in rows) <= NUM_SELECTED:
        assert selected is None
        return
    assert selected is not None and selected.dtype == torch.int32
    for row, (context_len, num_new) in enumerate(rows):
        keys = kv.key[blocks[row]].flatten(0, 2)[:context_len].double()
        for index in range(num_new):
            token = metadata.query_start_cpu[row] + index
            num_seen = context_len - num_new + index + 1
            scores = (keys[:num_seen] @ query[token].double().T).relu() @ weight[token].double()
            found = [position for position in selected[token].tolist() if position >= 0]
            assert len(found) == len(set(found)) == min(num_seen, NUM_SELECTED)
            assert max(found) < num_seen
            # Equal scores are won by earlier positions, so the sum of positions tells, too.
            best = sorted(range(num_seen), key=lambda position: (-float(scores[position]), position))[:NUM_SELECTED]
            if dtype != torch.bfloat16:
                assert sorted(found) == sorted(best)
            else:
                assert abs(float(scores[found].sum() - scores[best].sum())) < 1e-4
