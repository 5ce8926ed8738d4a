"""How products are cut: as measured on a chip, near what was measured, or as guessed."""

from __future__ import annotations

import pytest

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.gemm_hopper_cut import stages_with_room
from atom_cluster.ops.triton.linear_blocks import (
    GEMM,
    GEMV,
    LIBRARY,
    choose,
    gemm_blocks,
    gemm_hopper_blocks,
    hopper_blocks,
)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "arch", lambda: "sm_90")
    monkeypatch.setattr(runtime, "is_hopper", lambda: True)


@pytest.mark.usefixtures("h200")
def test_measured_shapes_have_choices_of_their_own() -> None:
    assert choose("bfloat16", 1024, 2048, 1)["kernel"] == GEMV
    assert choose("bfloat16", 28672, 4096, 128)["kernel"] == LIBRARY
    for num_tokens in range(1, 129):
        choice = choose("float8", 2112, 7168, num_tokens)
        assert choice["kernel"] == LIBRARY or gemm_blocks(choice).tokens >= num_tokens


@pytest.mark.usefixtures("h200")
def test_other_shapes_have_as_many_programs_as_the_nearest() -> None:
    measured, other = (gemm_blocks(choose("float8", rows, 7168, 1)) for rows in (2112, 1100))
    assert measured.splits > 1 and other.splits == 2 * measured.splits
    assert choose("float16", 4096, 4096, 1) == choose("bfloat16", 4096, 4096, 1)
    few_inputs = choose("bfloat16", 700, 96, 32)
    assert few_inputs["kernel"] == LIBRARY or few_inputs["splits"] == 1


@pytest.mark.usefixtures("h200")
def test_the_hopper_kernel_is_chosen_near_where_it_won() -> None:
    assert hopper_blocks("bfloat16", 28672, 4096, 1) and hopper_blocks("float8", 3072, 4096, 1)
    assert hopper_blocks("float8_block", 7168, 16384, 1) is None
    with_norm, without = (hopper_blocks("bfloat16", 6144, size, 1) for size in (1024, 4096))
    assert with_norm and with_norm.norms and without and not without.norms
    assert hopper_blocks("bfloat16", 28672, 4096, 2) and hopper_blocks("bfloat16", 28672, 4096, 5) is None
    assert hopper_blocks("float32", 4096, 4096, 1) is None
    # Where it cannot be used after all, others are chosen as if it were not there.
    assert choose("bfloat16", 4096, 4096, 1)["kernel"] == GEMV


@pytest.mark.usefixtures("h200")
def test_some_tokens_are_multiplied_by_the_hopper_kernel_where_it_won() -> None:
    measured = gemm_hopper_blocks("float8_block", 7168, 16384, 100)
    assert measured is not None and measured.tokens == 128 and measured.splits > 1
    for num_tokens in (8, 300):
        assert gemm_hopper_blocks("float8_block", 7168, 16384, num_tokens) is None
    assert gemm_hopper_blocks("bfloat16", 128256, 4096, 128) is None
    # Other shapes have about as many programs, and no more than their inputs are enough for.
    for num_out, num_in in ((1024, 16384), (1024, 2048), (640, 512), (40000, 1024)):
        for num_tokens in (9, 30, 64, 128):
            blocks = gemm_hopper_blocks("float8_block", num_out, num_in, num_tokens)
            if blocks is not None:
                assert blocks.splits <= max(1, num_in // 512) and blocks.tokens >= num_tokens
                assert stages_with_room(blocks, is_grouped=True) >= blocks.groups


def test_chips_without_measurements_have_guesses() -> None:
    assert hopper_blocks("bfloat16", 4096, 4096, 1) is None
    assert choose("bfloat16", 4096, 4096, 2)["kernel"] == GEMV
    assert choose("bfloat16", 4096, 4096, 5)["kernel"] == LIBRARY
    assert choose("int4", 4096, 4096, 1)["splits"] == 8
    assert gemm_blocks(choose("float8", 4096, 4096, 40)).tokens == 64
    assert choose("float8", 4096, 4096, 1)["kernel"] == GEMM
