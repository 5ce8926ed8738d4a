"""Dummy weights: a rank's part is the part of the same full tensor."""

import pytest
import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.dummy import fill_weights
from atom_cluster.weights.rules import CheckpointMap

SHAPE = (2500, 6)


class Model:
    def __init__(self, parts: dict[str, WeightPart]) -> None:
        self._parts = parts

    def checkpoint_map(self) -> CheckpointMap:
        return CheckpointMap(parts=self._parts)

    def finish_loading(self) -> None:
        raise AssertionError("filling does not finish the model")


def fill(
    *, seed: int = 0, name: str = "w", shape: tuple[int, ...] = SHAPE, cut: tuple[slice, ...] = (), swaps: bool = False
) -> torch.Tensor:
    target = torch.zeros(shape)[cut]
    target = target.transpose(-2, -1) if swaps else target
    fill_weights(Model({name: WeightPart(target=target, full_shape=shape, cut=cut, is_transposed=swaps)}), seed)
    return target


@pytest.mark.parametrize(
    "cut",
    [
        (slice(0, 1250),),
        (slice(1250, 2500),),
        (slice(1023, 1025),),
        (slice(2, 2),),
        (slice(None), slice(2, 5)),
        (slice(1, None, 2),),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (2500, 6, 100)])
@pytest.mark.parametrize("swaps", [False, True])
def test_a_part_is_cut_from_the_same_whole(cut: tuple[slice, ...], shape: tuple[int, ...], swaps: bool) -> None:
    whole = fill(shape=shape, swaps=swaps)
    whole = whole.transpose(-2, -1) if swaps else whole
    part = fill(shape=shape, cut=cut, swaps=swaps)
    assert torch.equal(part.transpose(-2, -1) if swaps else part, whole[cut])


def test_vectors_are_cut_too_and_near_one() -> None:
    vector = fill(shape=(1000,))
    assert torch.equal(fill(shape=(1000,), cut=(slice(10, 15),)), vector[10:15])
    assert abs(vector.mean() - 1) < 0.05


def test_names_seeds_and_pieces_differ() -> None:
    assert not torch.equal(fill(), fill(seed=1))
    assert not torch.equal(fill(), fill(name="v"))
    whole = fill()
    assert not torch.equal(whole[:1000], whole[1024:2024])
    assert whole.std() == pytest.approx(6**-0.5, rel=0.05)
