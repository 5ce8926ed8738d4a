"""Interpreted, kernels apply experts of every format as the reference does."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.triton import moe
from atom_cluster.ops.triton.moe_sort import sort_pairs
from atom_cluster.ops.triton.runtime import INTERPRETED
from tests.ops.triton.moe_cases import FORMATS, Case, error, random_weight

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here; see test_moe_gpu")

OAI = ExpertActivation(kind="swiglu_oai", limit=0.7)
CASES = [
    Case(num_experts=5, size=192, expert_size=96, num_tokens=1, num_chosen=3, has_bias=True, activation=OAI),
    Case(num_experts=5, size=192, expert_size=96, num_tokens=9, num_chosen=3, has_addend=True),
]


@pytest.mark.parametrize("case", CASES, ids=["one", "few"])
@pytest.mark.parametrize("name", [None, *FORMATS])
def test_every_format(name: str | None, case: Case) -> None:
    assert error(case, name, dtype=torch.float32) < 1e-6


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("num_tokens", [1, 7, 600, 3000, 9000])
def test_every_pair_is_in_one_tile_of_its_expert(num_tokens: int, rows: int) -> None:
    num_experts = 11
    expert = torch.randint(0, num_experts + 1, (num_tokens, 4), generator=torch.Generator().manual_seed(num_tokens))
    expert[expert == 3] = 4
    tiles = sort_pairs(expert, num_experts, rows, 4)
    assert tiles.pair_N is not None
    assert tiles.count % 4 == 0
    seen = []
    found = tiles.tile_ptr.tolist()
    is_tile = [number >= 0 for number, *_ in found]
    assert is_tile == sorted(is_tile, reverse=True)
    assert tiles.found_1 is not None
    assert int(tiles.found_1) == sum(is_tile)
    for at, (number, start, stop, first_tile) in enumerate(found[: sum(is_tile)]):
        assert found[first_tile][0] == number
        assert start == found[first_tile][1] + (at - first_tile) * rows
        pairs = tiles.pair_N[start : min(stop, start + rows)].tolist()
        assert pairs
        assert {int(expert.flatten()[pair]) for pair in pairs} == {number}
        seen += pairs
    assert sorted(seen) == (expert.flatten() < num_experts).nonzero().flatten().tolist()


def test_no_tokens() -> None:
    experts = moe.prepare_experts(
        torch.randn(2, 8, 6),
        torch.randn(2, 6, 4),
        gate_up_bias=None,
        down_bias=None,
        activation=ExpertActivation(),
        dtype=torch.float32,
    )
    choices = torch.empty(0, 2, dtype=torch.int64)
    assert experts(torch.empty(0, 6), choices, torch.empty(0, 2)).shape == (0, 6)


def test_the_name_says_what_kernels_do_not_take() -> None:
    weights = [random_weight(2, *shape, number="int8", columns=12) for shape in ((48, 24), (24, 24))]
    op = moe.prepare_quantized_experts(
        *weights, gate_up_bias=None, down_bias=None, activation=ExpertActivation(), dtype=torch.float32
    )
    assert op.name == "int8 1x12 x 2 experts, expert by expert: 12 inputs share a scale"
