"""Dummy weights: a rank's part is the part of the same full tensor."""

import pytest
import torch

from atom_cluster.parallel.sharding import Span, WeightPart
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


def fill(*, seed: int = 0, name: str = "w", shape: tuple[int, ...] = SHAPE, axis: int = 0, span: Span | None = None):
    size = list(shape)
    if span is not None:
        size[axis] = span.length
    target = torch.zeros(size)
    fill_weights(Model({name: WeightPart(target=target, full_shape=shape, axis=axis, span=span)}), seed)
    return target


@pytest.mark.parametrize(
    ("axis", "span"), [(0, Span(0, 1250)), (0, Span(1250, 1250)), (0, Span(1023, 2)), (0, Span(2, 0)), (1, Span(2, 3))]
)
def test_a_part_is_cut_from_the_same_whole(axis: int, span: Span) -> None:
    assert torch.equal(fill(axis=axis, span=span), fill().narrow(axis, span.start, span.length))


def test_vectors_are_cut_too_and_near_one() -> None:
    vector = fill(shape=(1000,))
    assert torch.equal(fill(shape=(1000,), span=Span(10, 5)), vector[10:15])
    assert abs(vector.mean() - 1) < 0.05


def test_names_seeds_and_pieces_differ() -> None:
    assert not torch.equal(fill(), fill(seed=1))
    assert not torch.equal(fill(), fill(name="v"))
    whole = fill()
    assert not torch.equal(whole[:1000], whole[1024:2024])
    assert whole.std() == pytest.approx(6**-0.5, rel=0.05)
