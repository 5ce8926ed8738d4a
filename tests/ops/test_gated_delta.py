"""Gated DeltaNet: every backend computes the recurrence, written out here in float64, and keeps the right states."""

from dataclasses import dataclass

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.cpu.gated_delta import SEGMENT_TOKENS
from atom_cluster.ops.gated_delta import Gates, StateMetadata
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}
CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE] + [("triton", torch.float32)]

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 8, 5
CHANNELS, WIDTH = 7, 4
NUM_PAGES = 12


@dataclass(frozen=True)
class Row:
    num_tokens: int
    read: int
    write: tuple[int, ...]
    keeps_all: bool = False


SEGMENTS = "a prompt of more than one segment"
STEPS = {
    "decode rows": [Row(1, 3, (4,)), Row(1, 5, (5,)), Row(1, -1, (6,))],
    "a whole prompt of many chunks": [Row(200, -1, (2,))],
    SEGMENTS: [Row(2 * SEGMENT_TOKENS + 88, 7, (7,))],
    "chunks of every size": [Row(2, 1, (2,)), Row(63, -1, (3,)), Row(64, 4, (4,)), Row(65, 5, (6,)), Row(129, 7, (8,))],
    "decodes, chunks, and a shared state": [Row(1, 9, (0,)), Row(5, 9, (1,)), Row(3, -1, (2,)), Row(1, 9, (3,))],
    "drafts of several lengths": [
        Row(1, 0, (0, 1, 2), keeps_all=True),
        Row(3, 3, (3, 4, 5), keeps_all=True),
        Row(70, 6, (6, 11, 11)),
        Row(2, -1, (7, 8, 11), keeps_all=True),
        Row(3, 9, (10, 9, 11)),
    ],
}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metadata(rows: list[Row]) -> tuple[AttentionMetadata, StateMetadata]:
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.num_tokens)
    attention = AttentionMetadata(
        block_size=4,
        num_decode_rows=next((i for i, row in enumerate(rows) if row.num_tokens > 1), len(rows)),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.zeros(len(rows), dtype=torch.int32),
        block_table=torch.zeros(len(rows), 0, dtype=torch.int32),
        slot=torch.zeros(0, dtype=torch.int64),
        query_start_cpu=tuple(starts),
        context_len_cpu=(0,) * len(rows),
    )
    states = StateMetadata(
        read_page=torch.tensor([row.read for row in rows]),
        write_page=torch.tensor([row.write for row in rows]),
        keeps_all_cpu=tuple(row.keeps_all for row in rows),
    )
    return attention, states


def strided_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Pages of one layer among others, full of old numbers."""
    return randn(NUM_PAGES, 3, *shape, dtype=dtype, seed=8)[:, 1]


def assert_states(found: torch.Tensor, before: torch.Tensor, wanted: dict[int, torch.Tensor], tolerance: float) -> None:
    """Written pages hold what is wanted, all others what they did."""
    for page in range(NUM_PAGES):
        if page in wanted:
            torch.testing.assert_close(found[page].double(), wanted[page], atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(found[page], before[page]), f"page {page} belongs to nobody"


def written(row: Row, states: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    return dict(zip(row.write, states)) if row.keeps_all else {row.write[0]: states[-1]}


@pytest.mark.parametrize("name", STEPS)
def test_the_convolution_sees_the_inputs_before_the_step(case: tuple[OpTable, torch.dtype], name: str) -> None:
    ops, dtype = case
    rows = STEPS[name]
    attention, states = metadata(rows)
    num_tokens = attention.query_start_cpu[-1]
    x = randn(num_tokens, CHANNELS + 2, dtype=dtype)[:, 1:-1]
    weight = randn(CHANNELS, WIDTH, dtype=dtype, seed=1)
    past = strided_pages(CHANNELS, WIDTH - 1, dtype=dtype)
    before = past.clone()
    y = ops.plan_gated_delta(attention, states).convolve(x, weight, past)
    assert y.dtype == dtype and y.is_contiguous()
    wanted: dict[int, torch.Tensor] = {}
    for row, start in zip(rows, attention.query_start_cpu):
        old = before[row.read] if row.read >= 0 else torch.zeros_like(before[0])
        inputs = torch.cat((old, x[start : start + row.num_tokens].T), dim=1).double()
        sums = torch.stack([(inputs[:, t : t + WIDTH] * weight.double()).sum(1) for t in range(row.num_tokens)])
        tolerance = TOLERANCE[dtype]
        actual = y[start : start + row.num_tokens].double()
        torch.testing.assert_close(actual, sums * sums.sigmoid(), atol=tolerance, rtol=tolerance)
        wanted |= written(row, [inputs[:, t + 1 : t + WIDTH] for t in range(row.num_tokens)])
    assert_states(past, before, wanted, tolerance=0.0)


@pytest.mark.parametrize("name", STEPS)
def test_the_delta_rule_is_its_recurrence(
    case: tuple[OpTable, torch.dtype], name: str, request: pytest.FixtureRequest
) -> None:
    ops, dtype = case
    if name == SEGMENTS and "triton" in request.node.name:
        pytest.skip("kernels know chunks alone, and interpreted they are slow")
    rows, wide = STEPS[name], torch.promote_types(dtype, torch.float32)
    attention, states = metadata(rows)
    num_tokens = attention.query_start_cpu[-1]
    sizes = [KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM]
    query, key, value = (randn(num_tokens, sum(sizes), dtype=dtype) * 3).split(sizes, dim=1)
    query, key = (x.view(num_tokens, KEY_HEADS, KEY_DIM) for x in (query, key))
    value = value.view(num_tokens, VALUE_HEADS, VALUE_DIM)
    learn, decay = randn(num_tokens, 2 * VALUE_HEADS, dtype=dtype, seed=1).chunk(2, dim=1)
    log_rate, decay_bias = randn(VALUE_HEADS, dtype=wide, seed=2), randn(VALUE_HEADS, dtype=wide, seed=3)
    memory = strided_pages(VALUE_HEADS, KEY_DIM, VALUE_DIM, dtype=wide)
    before = memory.clone()
    plan = ops.plan_gated_delta(attention, states)
    output = plan.delta_rule(query, key, value, Gates(decay, learn, log_rate, decay_bias), memory)
    assert output.dtype == dtype and output.is_contiguous()

    kept = torch.exp(-log_rate.double().exp() * torch.log1p((decay.double() + decay_bias.double()).exp()))
    share = learn.double().sigmoid()
    query, key = (x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    wanted: dict[int, torch.Tensor] = {}
    expected = torch.empty(value.shape, dtype=torch.float64)
    for row, start in zip(rows, attention.query_start_cpu):
        state = before[row.read].double() if row.read >= 0 else torch.zeros_like(before[0], dtype=torch.float64)
        found = []
        for t in range(start, start + row.num_tokens):
            for head in range(VALUE_HEADS):
                k, q = (x[t, head // (VALUE_HEADS // KEY_HEADS)] for x in (key, query))
                faded = kept[t, head] * state[head]
                new = faded + torch.outer(k, share[t, head] * (value[t, head].double() - faded.T @ k))
                state = state.index_copy(0, torch.tensor([head]), new[None])
                expected[t, head] = new.T @ q * KEY_DIM**-0.5
            found.append(state)
        wanted |= written(row, found)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_states(memory, before, wanted, tolerance=1e-11 if wide == torch.float64 else 2e-5)


def test_the_gated_norm(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    x, gate = randn(3, 4, 24, dtype=dtype) * 3, randn(3, 4, 30, dtype=dtype, seed=1)[..., 6:]
    weight = randn(24, dtype=dtype, seed=2)
    wide, z = x.double(), gate.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() * z * z.sigmoid()
    actual = ops.gated_rms_norm(x, gate, weight, 1e-5)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
