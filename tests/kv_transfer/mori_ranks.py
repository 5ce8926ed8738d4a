"""Two ranks over the stand-in for MORI-IO, and what tests of its failures need."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from atom_cluster.kv_transfer.protocol import ReadCompletion
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.units import Deadline
from tests.kv_transfer.mori_io_stand_in import CRIMES, ENGINES, FAULTS
from tests.kv_transfer.ranks import SECRET, Rank, rank_here

NAME = "mori/stand-in"
SETTINGS = TransportSettings(rank=0, host="127.0.0.1", secret=SECRET)
SCATTERED = tuple(range(0, 2000, 2))
"""More segments than a transfer has: the first transfer has MAX_BATCH_SEGMENTS."""


@contextmanager
def nothing_that_crashes_mori() -> Iterator[None]:
    """Around a test: fails it for what would have; takes its faults away."""
    FAULTS.__dict__.clear()
    assert not CRIMES
    yield
    FAULTS.__dict__.clear()
    crimes = list(CRIMES)
    CRIMES.clear()
    assert not crimes


@contextmanager
def two_ranks(num_blocks: int = 2000, block_bytes: int = 64) -> Iterator[tuple[Rank, Rank]]:
    """A reader that is connected to an exporter, as `peer`, of one group with these blocks."""
    with (
        rank_here(NAME, num_blocks=num_blocks, block_bytes=(block_bytes,), seed=7) as exporter,
        rank_here(NAME, num_blocks=num_blocks, block_bytes=(block_bytes,)) as reader,
    ):
        reader.transport.connect("peer", exporter.descriptor)
        yield reader, exporter


def start(reader: Rank, read_id: int, blocks: tuple[int, ...], *, deadline_s: float = 20, peer: str = "peer") -> None:
    reader.transport.start_read(read_id, peer, 0, blocks, blocks, Deadline.after(deadline_s))


def ends_within(reader: Rank, seconds: float) -> list[ReadCompletion]:
    """What ends in that time."""
    found: list[ReadCompletion] = []
    deadline = Deadline.after(seconds)
    while not deadline.has_passed:
        found += reader.transport.poll()
        time.sleep(0.001)
    return found


def reading_engines() -> list[Any]:
    return [engine for engine in ENGINES if ":reads:" in engine.get_engine_desc().key and not engine.is_closed]


class Gate:
    """Holds writes of transfers back until it is opened."""

    def __init__(
        self, concerns: Callable[[Any, int], bool] = lambda transfer, segment: transfer.num_segments > 1
    ) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self._concerns = concerns

    def __call__(self, transfer: Any, segment: int) -> None:
        if self._concerns(transfer, segment):
            self.reached.set()
            assert self.opened.wait(20)
