"""Latent attention by sm_90's kernels, run as they stand by threads on the CPU, is the reference's."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.ops.mla import MlaDims
from atom_cluster.ops.triton import mla, mla_absorbed, mla_expanded_hopper, mla_hopper, runtime
from tests.ops.test_attention_contract import scattered_rows
from tests.ops.test_mla_contract import TOLERANCE, check
from tests.ops.triton.gluon_on_cpu import Descriptor, Machine

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")


@pytest.fixture(autouse=True)
def tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over real heads' dims are larger than those over the contract's small ones."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 2e-4)


def dims(num_heads: int) -> MlaDims:
    return MlaDims(num_heads=num_heads, latent_dim=256, nope_dim=128, rope_dim=64, value_dim=128)


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(seed=1)
    machine.install(monkeypatch, mla_hopper, ["attend_kernel", "_row", "_load", "_attend", "_slots"])
    sizes = mla_hopper.NUM_QUERIES, mla_hopper.NUM_KEYS, mla_hopper.NUM_WARPS
    monkeypatch.setattr(mla, "choose_tiles", lambda *_: mla_absorbed.Tiles(*sizes, stages=1, is_hopper=True))
    return machine


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(seed=2)
    machine.install(monkeypatch, mla_expanded_hopper, ["attend_kernel", "_num_blocks", "_load", "_attend"])
    monkeypatch.setattr(mla_expanded_hopper, "_tiles_of", lambda x: Descriptor(x, mla_expanded_hopper.BLOCK_N))
    monkeypatch.setattr(mla_expanded_hopper, "is_fit", lambda *_: True)
    return machine


@pytest.mark.parametrize(
    ("num_heads", "rows", "is_sparse"),
    [
        (3, [(1, 1), (17, 1), (128, 1), (700, 1), (129, 1)], False),
        (70, [(1, 1), (200, 1)], False),
        (20, [(4, 4), (150, 4)], False),
        (3, [(1, 1), (300, 1), (140, 2)], True),
    ],
    ids=["decode", "two tiles", "drafts", "sparse"],
)
def test_absorbed(absorbed: Machine, num_heads: int, rows: list[tuple[int, int]], is_sparse: bool) -> None:
    check("triton", rows, dims(num_heads), torch.float32, is_sparse=is_sparse)
    assert absorbed.num_launches


@pytest.mark.parametrize("num_multiprocessors", [1, 1000], ids=["tiles in pairs", "a tile each"])
@pytest.mark.parametrize(
    "rows",
    [[(257, 257), (40, 40), (128, 128)], [(333, 205), (70, 70)]],
    ids=["whole", "continued"],
)
def test_expanded(
    expanded: Machine, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]], num_multiprocessors: int
) -> None:
    monkeypatch.setattr(runtime, "num_multiprocessors", lambda _: num_multiprocessors)
    check("triton", rows, dims(2), torch.float32, is_sparse=False)
    assert expanded.num_launches


def test_short_rows_and_long_ones_are_attended_to_apart() -> None:
    metadata, _ = scattered_rows([(200, 1), (40, 3), (300, 20), (140, 140), (290, 290)], None)
    runs = mla.plan_mla(metadata, dims(2))._runs
    assert [(run.rows, run.is_expanded) for run in runs] == [
        (slice(0, 2), False),
        (slice(2, 3), False),
        (slice(3, 5), True),
    ]
