"""Every backend's compression, and index and attention over its entries, against all written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform
from tests.ops.test_attention_contract import BLOCK_SIZE, STEPS, randn, scattered_rows
from tests.ops.test_mla_contract import SLOW_TO_INTERPRET

BACKENDS = ["torch", "cpu"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
CASES = [(backend, dtype) for backend in BACKENDS for dtype in TOLERANCE] + [("triton", torch.float32)]
SIZES = [2, BLOCK_SIZE, 4 * BLOCK_SIZE]
"""Tokens per entry: less than a block, a block, several."""
DIM, NUM_HEADS, WINDOW, SCALE = 6, 5, 7, 0.4


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    backend, dtype = request.param
    return backend, dtype


@pytest.mark.parametrize("num_series", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_leave_the_entries_that_they_complete(
    case: tuple[str, torch.dtype], name: str, size: int, num_series: int
) -> None:
    backend, dtype = case
    skip_if_slow(backend, name)
    rows, window = STEPS[name], size * num_series
    wide = torch.promote_types(dtype, torch.float32)
    tokens, token_blocks = scattered_rows(rows, window)
    entries, entry_blocks = scattered_rows(rows, None)
    num_tokens, num_blocks = tokens.query_start_cpu[-1], 1 + sum(map(len, token_blocks))
    inputs = cache(num_blocks, BLOCK_SIZE, num_series * DIM, num_series * DIM, dtype)
    kept = cache(num_blocks, max(1, BLOCK_SIZE // size), DIM, 0, dtype)
    before = kept.key.double().clone()
    value, gate = (randn(num_tokens, num_series * DIM, seed=seed).to(dtype) for seed in (1, 2))
    bias = randn(window, DIM, seed=3).to(wide)

    plan = ops_of(backend, dtype).plan_compression(tokens, entries, tokens_per_entry=size, num_series=num_series)
    pooled = plan.pool(value, gate, bias, inputs)
    assert pooled.shape == (len(plan.first_positions), DIM) and pooled.dtype == wide
    assert (plan.first_positions % size == 0).all()
    plan.store(pooled, kept)

    for row, (context_len, num_new) in enumerate(rows):
        stored = [paged[token_blocks[row]].flatten(0, 2)[:context_len].double() for paged in (inputs.key, inputs.value)]
        first_new = (context_len - num_new) // size
        for entry in range(context_len // size):
            at = (*place(entry, size, entry_blocks[row]), 0)
            is_new = entry >= first_new
            expected = pool_one(*stored, bias.double(), entry, size, num_series) if is_new else before[at]
            torch.testing.assert_close(kept.key[at].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def pool_one(
    values: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, entry: int, size: int, num_series: int
) -> torch.Tensor:
    """Slot by slot."""
    weighted, total = torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    for series in range(num_series):
        group = entry - (num_series - 1) + series
        for index in range(size) if group >= 0 else ():
            dims = slice(series * DIM, (series + 1) * DIM)
            weight = (gates[group * size + index, dims] + bias[series * size + index]).exp()
            weighted += weight * values[group * size + index, dims]
            total += weight
    return weighted / total


@pytest.mark.parametrize("num_selected", [None, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPS)
def test_attention_sees_a_window_and_the_complete_entries(
    case: tuple[str, torch.dtype], name: str, size: int, num_selected: int | None
) -> None:
    backend, dtype = case
    skip_if_slow(backend, name)
    rows, ops = STEPS[name], ops_of(backend, dtype)
    tokens, token_blocks = scattered_rows(rows, WINDOW)
    entries, entry_blocks = scattered_rows(rows, None)
    num_tokens, num_blocks = tokens.query_start_cpu[-1], 1 + sum(map(len, token_blocks))
    keys = cache(num_blocks, BLOCK_SIZE, DIM, 0, dtype)
    compressed = cache(num_blocks, max(1, BLOCK_SIZE // size), DIM, 0, dtype)
    query = randn(num_tokens, NUM_HEADS, DIM, seed=1).to(dtype)
    sinks = randn(NUM_HEADS, seed=2).to(torch.promote_types(dtype, torch.float32))
    selected = None if num_selected is None else select_last(entries, size, num_selected)

    plan = ops.plan_compressed_attention(tokens, entries, tokens_per_entry=size)
    plan.store(randn(num_tokens, DIM, seed=3).to(dtype), keys)
    output = plan.attend(query, keys, compressed, scale=SCALE, sink_H=sinks, selected_TK=selected)

    assert output.is_contiguous() and output.dtype == dtype and output.shape == query.shape
    for row, (context_len, num_new) in enumerate(rows):
        own = keys.key[token_blocks[row]].flatten(0, 2)[:context_len].double()
        theirs = entries_of(compressed, entry_blocks[row], context_len, size)
        for index in {0, num_new // 2, num_new - 1}:
            token, position = tokens.query_start_cpu[row] + index, context_len - num_new + index
            seen = list(range((position + 1) // size))
            seen = seen if num_selected is None else seen[-num_selected:]
            known = torch.cat((own[max(0, position - WINDOW + 1) : position + 1], theirs[seen]))
            weight = (query[token].double() @ known.T * SCALE).exp()
            expected = weight @ known / (weight.sum(-1) + sinks.double().exp())[:, None]
            torch.testing.assert_close(output[token].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", SIZES)
def test_what_the_host_takes_for_the_lengths_of_rows_may_be_too_much(size: int) -> None:
    """As on devices other than CPUs, where it does not know how many drafts were kept."""
    rows, results = [(9, 1), (41, 1), (33, 3), (70, 20)], []
    for excess in (0, 5):
        metadata = []
        for window in (WINDOW, 2 * size, None):
            exact, blocks = scattered_rows(rows, window)
            table = torch.nn.functional.pad(exact.block_table, (0, 2))
            known = tuple(length + excess for length in exact.context_len_cpu)
            metadata.append(replace(exact, block_table=table, context_len_cpu=known))
        tokens, pooled, full = metadata
        num_tokens, num_blocks = full.query_start_cpu[-1], 1 + sum(map(len, blocks))
        keys, inputs = (cache(num_blocks, BLOCK_SIZE, dim, dim, torch.float64) for dim in (DIM, 2 * DIM))
        kept = cache(num_blocks, max(1, BLOCK_SIZE // size), DIM, 0, torch.float64)
        ops = ops_of("torch", torch.float64)
        compression = ops.plan_compression(pooled, full, tokens_per_entry=size, num_series=2)
        value, gate = (randn(num_tokens, 2 * DIM, seed=seed) for seed in (1, 2))
        compression.store(compression.pool(value, gate, randn(2 * size, DIM, seed=3), inputs), kept)
        plan = ops.plan_compressed_attention(tokens, full, tokens_per_entry=size)
        query, sinks = randn(num_tokens, NUM_HEADS, DIM, seed=4), randn(NUM_HEADS, seed=5)
        results.append(plan.attend(query, keys, kept, scale=SCALE, sink_H=sinks, selected_TK=None))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STEPS)
def test_the_index_selects_among_complete_entries(case: tuple[str, torch.dtype], name: str, size: int) -> None:
    (backend, dtype), rows, num_selected = case, STEPS[name], 3
    if dtype == torch.bfloat16:
        pytest.skip("equal scores come from rounding")
    skip_if_slow(backend, name)
    metadata, blocks = scattered_rows(rows, None)
    num_tokens = metadata.query_start_cpu[-1]
    kept = cache(1 + sum(map(len, blocks)), max(1, BLOCK_SIZE // size), DIM, 0, dtype)
    query, weight = (
        randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate([(num_tokens, 8, DIM), (num_tokens, 8)])
    )
    plan = ops_of(backend, dtype).plan_index(metadata, tokens_per_entry=size)
    selected = plan.select(query, weight, kept, num_selected=num_selected)
    if max(context_len // size for context_len, _ in rows) <= num_selected:
        assert selected is None
        return
    assert selected is not None
    for row, (context_len, num_new) in enumerate(rows):
        keys = entries_of(kept, blocks[row], context_len, size)
        for index in range(num_new):
            token, num_seen = metadata.query_start_cpu[row] + index, (context_len - num_new + index + 1) // size
            scores = (keys[:num_seen] @ query[token].double().T).relu() @ weight[token].double()
            best = sorted(range(num_seen), key=lambda entry: (-float(scores[entry]), entry))[:num_selected]
            assert sorted(selected[token].tolist()) == sorted(best + [-1] * (num_selected - len(best)))


def skip_if_slow(backend: str, name: str) -> None:
    if backend == "triton" and name in SLOW_TO_INTERPRET:
        pytest.skip("takes long in the interpreter; GPUs are tested with such steps")


def select_last(metadata: AttentionMetadata, size: int, num_selected: int) -> torch.Tensor:
    """Of each token the last complete entries; -1 for those that there are not."""
    starts, lines = metadata.query_start_cpu, []
    for start, end, context_len in zip(starts, starts[1:], metadata.context_len_cpu):
        for position in range(context_len - (end - start), context_len):
            num_seen = (position + 1) // size
            last = [entry for entry in range(num_seen - num_selected, num_seen) if entry >= 0]
            lines.append(last + [-1] * (num_selected - len(last)))
    return torch.tensor(lines, dtype=torch.int32)


def place(entry: int, size: int, blocks: torch.Tensor) -> tuple[int, int]:
    """Page and offset of a row's entry: with its last token."""
    last = (entry + 1) * size - 1
    return int(blocks[last // BLOCK_SIZE]), last % BLOCK_SIZE // size


def entries_of(kept: KvLayerCache, blocks: torch.Tensor, context_len: int, size: int) -> torch.Tensor:
    """A row's entries, in order."""
    places = [place(entry, size, blocks) for entry in range(context_len // size)]
    return torch.stack([kept.key[page, offset, 0].double() for page, offset in places] or [torch.zeros(DIM).double()])


def cache(num_blocks: int, num_entries: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> KvLayerCache:
    """The second of three layers of a block-major memory, filled with old numbers."""
    memory = randn(num_blocks, 3, num_entries, 1, key_dim + value_dim, seed=4).to(dtype)
    return KvLayerCache(memory[:, 1, ..., :key_dim], memory[:, 1, ..., key_dim:])


def ops_of(backend: str, dtype: torch.dtype) -> OpTable:
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype)
