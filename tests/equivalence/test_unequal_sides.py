"""Prefill and decode engines that lay out KV differently: in other numbers of ranks, in blocks of other sizes.

Their answers are those of a single engine, and exactly the bytes that decode's ranks lack are moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.kv_cache.page_map import PageMap, page_maps
from atom_cluster.models.registry import build_model, read_spec
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_BAD_BLOCKS, KV_TRANSFER_BYTES, KV_TRANSFER_FAILURES
from atom_cluster.ops.select import torch_table
from tests.equivalence.generation import Request, generate, mixed_requests
from tests.equivalence.pairs import KINDS, Pair, Side
from tests.models.paged_driver import make_context
from tests.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return {}


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Pairs that a test made, closed after it."""
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


def assert_equal_to_one_engine(
    model: str, transport: str, sides: tuple[Side, Side], pairs: list[Pair], known: dict[str, list[list[int]]]
) -> None:
    if model not in known:
        known[model] = generate(model, mixed_requests())
    prefill, decode = sides
    pair = Pair(tiny_model_dir(model), transport=transport, prefill=prefill, decode=decode, max_num_batched_tokens=40)
    pairs.append(pair)
    metrics = pair.metrics["decode"]
    assert pair.generate(mixed_requests(), timeout_s=60.0) == known[model]
    assert_nothing_failed(metrics)
    if model != "deepseek_v4":  # entries of several tokens are where their last one is
        assert metrics.value(KV_TRANSFER_BYTES) == num_bytes_needed(model, prefill, decode, mixed_requests())
    for core in pair.cores.values():
        assert {state for state, count in core.stats().blocks_by_state.items() if count} <= {"free", "cached"}
    # Again, with what is cached on either side.
    assert pair.generate(mixed_requests(), timeout_s=60.0) == known[model]
    assert_nothing_failed(metrics)


def assert_nothing_failed(metrics: MemoryMetrics) -> None:
    assert not {KV_TRANSFER_FAILURES.name, KV_BAD_BLOCKS.name} & metrics.sample_lines({}).keys()


def num_bytes_needed(model: str, prefill: Side, decode: Side, requests: list[Request]) -> int:
    """What all ranks of decode read of the tokens of these prompts, in whole units."""
    context = make_context(torch_table("test"), dtype=torch.float64)
    layout = build_model(read_spec(tiny_model_dir(model)), context, max_model_len=256).kv_layout
    unit = min(prefill.block_size, decode.block_size)
    num_bytes = 0
    for group, pages in zip(layout.groups, page_maps(layout), strict=True):
        for prompt, _ in requests:
            num_units = 1 if pages.is_state else -(-len(prompt) // unit)
            if group.window is not None:
                first_seen = max(0, len(prompt) - group.window + 1)
                num_units -= max(first_seen // side.block_size * side.block_size for side in (prefill, decode)) // unit
            num_bytes += num_units * sum(
                _unit_bytes(pages, rank, decode.num_ranks, unit) for rank in range(decode.num_ranks)
            )
    return num_bytes


def _unit_bytes(pages: PageMap, rank: int, num_ranks: int, unit: int) -> int:
    return pages.offsets(rank, num_ranks, unit)[-1]


SIZES = ((4, 8), (8, 4), (4, 16), (32, 8))
BLOCKS = [("shm", kind, sizes) for kind in KINDS for sizes in SIZES]
BLOCKS += [("tcp", kind, SIZES[(i + turn) % len(SIZES)]) for i, kind in enumerate(KINDS) for turn in range(2)]
"""All sizes of all kinds, and over sockets each kind and each size several times."""


def id_of(value: str | tuple[int, int]) -> str:
    return value if isinstance(value, str) else f"{value[0]} to {value[1]}"


@pytest.mark.parametrize(("transport", "model", "sizes"), BLOCKS, ids=id_of)
def test_blocks_of_other_sizes(
    model: str, transport: str, sizes: tuple[int, int], pairs: list[Pair], expected: dict[str, list[list[int]]]
) -> None:
    sides = Side(block_size=sizes[0], num_blocks=256), Side(block_size=sizes[1], num_blocks=256)
    assert_equal_to_one_engine(model, transport, sides, pairs, expected)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
@pytest.mark.parametrize(("transport", "model"), [("shm", kind) for kind in KINDS] + [("tcp", kind) for kind in KINDS])
def test_other_numbers_of_ranks(
    model: str, transport: str, ranks: tuple[int, int], pairs: list[Pair], expected: dict[str, list[list[int]]]
) -> None:
    sides = Side(num_ranks=ranks[0]), Side(num_ranks=ranks[1])
    assert_equal_to_one_engine(model, transport, sides, pairs, expected)


@pytest.mark.parametrize("sides", [(Side(block_size=4), Side(num_ranks=2)), (Side(num_ranks=2, block_size=16), Side())])
def test_both_at_once(sides: tuple[Side, Side], pairs: list[Pair], expected: dict[str, list[list[int]]]) -> None:
    assert_equal_to_one_engine("qwen3_next", "tcp", sides, pairs, expected)


@pytest.mark.parametrize("model", KINDS)
def test_damaged_blocks_are_found_and_computed_again(
    model: str, pairs: list[Pair], expected: dict[str, list[list[int]]]
) -> None:
    if model not in expected:
        expected[model] = generate(model, mixed_requests())
    pair = Pair(
        tiny_model_dir(model),
        transport="shm",
        prefill=Side(block_size=16),
        decode=Side(block_size=4, num_blocks=256),
        max_num_batched_tokens=40,
        decode_faults=FaultsConfig(corrupt_reads=0.4),
    )
    pairs.append(pair)
    assert pair.generate(mixed_requests(), timeout_s=60.0) == expected[model]
    assert pair.metrics["decode"].value(KV_BAD_BLOCKS) > 0
    assert KV_TRANSFER_FAILURES.name not in pair.metrics["decode"].sample_lines({})
