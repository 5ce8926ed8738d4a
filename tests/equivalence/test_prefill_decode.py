"""Prompts computed by one engine and continued by another, KV moved between them, give what one engine gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atom_cluster.kv_transfer.registry import available
from atom_cluster.models.registry import build_model, read_spec
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, PREFIX_CACHE_HITS
from atom_cluster.ops.select import torch_table
from tests.equivalence.generation import FAMILIES, Request, generate, mixed_requests
from tests.equivalence.pairs import BLOCK_SIZE, KINDS, Pair, Side
from tests.models.paged_driver import make_context
from tests.tiny_models import tiny_model_dir


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    return generate(model, mixed_requests())


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Pairs that a test made, closed after it."""
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


def assert_kv_came_from_prefill(pair: Pair, model: str, requests: list[Request]) -> None:
    """Every prompt's pages were transferred, no more of a window than its end; and nothing is held afterwards."""
    num_bytes = sum(num_bytes_needed(model, len(prompt)) for prompt, _ in requests)
    assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) == num_bytes
    for core in pair.cores.values():
        held = {state: count for state, count in core.stats().blocks_by_state.items() if count}
        assert set(held) <= {"free", "cached"}


def num_bytes_needed(model: str, num_tokens: int) -> int:
    """Size of the pages that the tokens behind a prompt need."""
    context = make_context(torch_table("test"), dtype=torch.float64)
    layout = build_model(read_spec(tiny_model_dir(model)), context, max_model_len=256).kv_layout
    num_columns = -(-num_tokens // BLOCK_SIZE)
    num_bytes = 0
    for group in layout.groups:
        num_behind = max(0, num_tokens - group.window + 1) // BLOCK_SIZE if group.window else 0
        num_pages = 1 if group.kind == "state" else num_columns - num_behind
        num_bytes += num_pages * layout.page_bytes(group, BLOCK_SIZE)
    return num_bytes


@pytest.mark.parametrize("transport", available("cpu"))
def test_a_pair_gives_what_one_engine_gives(
    model: str, expected: list[list[int]], pairs: list[Pair], transport: str
) -> None:
    if transport != "shm" and model not in KINDS:
        pytest.skip("shown with shared memory, and with this transport for a model whose KV is of that kind")
    pair = Pair(tiny_model_dir(model), transport=transport)
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
    assert_kv_came_from_prefill(pair, model, mixed_requests())


def test_it_makes_no_difference_which_engine_computes_prompt_and_output(
    model: str, expected: list[list[int]], pairs: list[Pair]
) -> None:
    """Side by side, so that steps have prompts, chunks for the other engine and rows that decode in them."""
    pair = Pair(tiny_model_dir(model), transport="shm", max_num_batched_tokens=20)
    pairs.append(pair)
    assert pair.generate(mixed_requests(), ways=("decode", "remote", "prefill")) == expected
    assert pair.generate(mixed_requests(), ways=("prefill", "decode", "remote")) == expected


def test_chunks_published_one_by_one_give_the_same(model: str, expected: list[list[int]], pairs: list[Pair]) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm", max_num_batched_tokens=20)
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected


def test_prefixes_cached_on_either_side_give_the_same(model: str, expected: list[list[int]], pairs: list[Pair]) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm")
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
    first_bytes = pair.metrics["decode"].value(KV_TRANSFER_BYTES)
    assert pair.generate(mixed_requests()) == expected
    assert pair.metrics["decode"].value(PREFIX_CACHE_HITS) > 0
    assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) < 2 * first_bytes


def test_a_decode_engine_short_of_blocks_gives_the_same(
    model: str, expected: list[list[int]], pairs: list[Pair]
) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm", decode=Side(num_blocks=16))
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
