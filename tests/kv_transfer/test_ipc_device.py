"""Lanes over a stream that is none: what the device reads later must still be there when it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from atom_cluster.kv_transfer import ipc_device
from atom_cluster.kv_transfer.ipc_copies import MAX_COPIES, Batch


class Event:
    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done


class Stream:
    cuda_stream = 0xABC
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]


class Copier:
    """Notes what it was given, as memory and as it was then."""

    def __init__(self) -> None:
        self.launches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, addresses: torch.Tensor, num_blocks: int, block_bytes: int, alignment: int, stream: int) -> None:
        assert (block_bytes, alignment, stream) == (64, 16, Stream.cuda_stream)
        self.launches.append((addresses[:num_blocks], addresses[:num_blocks].clone()))

    def check_intact(self, first: int = 0) -> None:
        assert all(torch.equal(memory, given) for memory, given in self.launches[first:])


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Stream, Copier]]:
    empty = torch.empty
    monkeypatch.setattr(ipc_device.torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    monkeypatch.setattr(ipc_device.torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream, copier = Stream(), Copier()
    yield ipc_device._StreamLane(stream, None, copier), stream, copier  # type: ignore[arg-type]


def batch(seed: int, count: int = 5) -> Batch:
    numbers = np.arange(count) + 1000 * seed
    sizes = np.full(count, 64)
    return Batch(numbers, numbers + 500, sizes, count * 64, by_kernel=True, alignment=16)


def test_targets_and_sources_stand_side_by_side(lane: tuple[Any, Stream, Copier]) -> None:
    lane[0].copy(batch(1, MAX_COPIES))
    (addresses, _) = lane[2].launches[0]
    assert addresses.shape == (MAX_COPIES, 2) and addresses.is_contiguous()
    assert addresses[[0, -1]].tolist() == [[1000, 1500], [999 + MAX_COPIES, 1499 + MAX_COPIES]]


def test_addresses_are_kept_until_the_fence_behind_them_is_done(lane: tuple[Any, Stream, Copier]) -> None:
    opened, stream, copier = lane
    opened.copy(batch(1))
    opened.copy(batch(2))
    first = opened.fence()
    opened.copy(batch(3))
    opened.fence()
    opened.copy(batch(4))
    copier.check_intact()
    assert first is stream.events[0]
    stream.events[0].is_done = True
    places = {memory.data_ptr() for memory, _ in copier.launches}
    opened.copy(batch(5))
    opened.copy(batch(6))
    assert {memory.data_ptr() for memory, _ in copier.launches[4:]} == {m.data_ptr() for m, _ in copier.launches[:2]}
    copier.check_intact(first=2)
    opened.copy(batch(7))
    assert copier.launches[6][0].data_ptr() not in places, "none was free"
    copier.check_intact(first=2)
