"""Loads a rank's shard of a checkpoint, strictly: nothing missing, nothing unused, shapes and dtypes as expected."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from atom_cluster.errors import WeightsError
from atom_cluster.weights.pieces import Piece, Staging, split
from atom_cluster.weights.problems import find_problems
from atom_cluster.weights.rules import CheckpointMap, LoadableModel
from atom_cluster.weights.safetensors_reader import Checkpoint

_log = logging.getLogger(__name__)

_NUM_THREADS = 8
"""They wait for the disk most of the time, so it takes more than there are CPUs to keep it busy."""
_PROGRESS_PERIOD_S = 10.0
_GB = 1e9


def load_weights(
    model: LoadableModel, checkpoint: Checkpoint, *, num_threads: int = _NUM_THREADS, log_level: int = logging.INFO
) -> None:
    """Read this rank's part of every tensor into the model. Does not call `finish_loading`.

    Only bytes that are needed, and gaps between them that are not worth a seek, are read, by `num_threads` threads.
    Beside the model's tensors that takes 16 MiB a thread (32 MiB for a GPU). Progress is logged at `log_level`.

    Raises one WeightsError that names every tensor that is missing, unused, mis-shaped or of a wrong dtype, before
    anything is read; WeightsError also for a file that turns out to be cut short.
    """
    checkpoint_map = model.checkpoint_map()
    check_fit(checkpoint_map, checkpoint)
    pieces = _pieces(checkpoint_map, checkpoint)
    if pieces:
        _Reading(pieces, where=str(checkpoint.directory), log_level=log_level).run(num_threads)


def check_fit(checkpoint_map: CheckpointMap, checkpoint: Checkpoint) -> None:
    """Raise one WeightsError that names every tensor that is missing, unused, mis-shaped or of a wrong dtype."""
    problems = find_problems(checkpoint_map, checkpoint)
    if problems:
        raise WeightsError("the checkpoint does not fit the model:\n" + "\n".join(problems))


def _pieces(checkpoint_map: CheckpointMap, checkpoint: Checkpoint) -> list[Piece]:
    """In the order of the files, which disks like best."""
    pieces = [
        piece
        for name, part in checkpoint_map.each_part()
        for piece in split(checkpoint.file(name), checkpoint.entry(name), part)
    ]
    return sorted(pieces, key=lambda piece: (piece.file.path, piece.offset))


class _Reading:
    """Pieces being read by several threads, each taking the next one."""

    def __init__(self, pieces: list[Piece], *, where: str, log_level: int) -> None:
        self._log_level = log_level
        self._num_files = len({piece.file.path for piece in pieces})
        self._total_bytes = sum(piece.num_bytes for piece in pieces)
        self._where = where
        self._pieces: Iterator[Piece] = iter(pieces)
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._must_stop = False

    def run(self, num_threads: int) -> None:
        """Read all. The first error of any thread is raised once all have stopped."""
        total = self._total_bytes / _GB
        _log.log(self._log_level, "reading %.2f GB in %d files of %s", total, self._num_files, self._where)
        start = time.monotonic()
        with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
            pending = {pool.submit(self._work) for _ in range(num_threads)}
            try:
                while pending:
                    done, pending = wait(pending, _PROGRESS_PERIOD_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if pending:
                        self._report("read", start)
            finally:
                self._must_stop = True
        self._report("finished:", start)

    @torch.inference_mode()  # as the caller may be in it, and threads do not inherit it
    def _work(self) -> None:
        staging = Staging()
        while (piece := self._next()) is not None:
            staging.load(piece)
            with self._lock:
                self._num_bytes += piece.num_bytes
        staging.finish()

    def _next(self) -> Piece | None:
        with self._lock:
            return None if self._must_stop else next(self._pieces, None)

    def _report(self, what: str, start: float) -> None:
        elapsed_s = max(time.monotonic() - start, 1e-9)
        rate = self._num_bytes / _GB / elapsed_s
        done, total = self._num_bytes / _GB, self._total_bytes / _GB
        _log.log(self._log_level, "%s %.2f of %.2f GB in %.1f s, %.2f GB/s", what, done, total, elapsed_s, rate)
