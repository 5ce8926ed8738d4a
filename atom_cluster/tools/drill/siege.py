"""All attacks on all listeners of a cluster, and what they left behind: descriptors, memory, lines in the log."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable

from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.hostile import ATTACKS
from atom_cluster.tools.drill.listeners import Listener, listeners_of, num_descriptors, resident_bytes
from atom_cluster.units import MiB

_CALM_TIMEOUT_S = 30.0
_PEAK_PERIOD_S = 0.1
_SPARE_DESCRIPTORS = 16
"""Those of the clients that ask meanwhile come and go."""
_SPARE_BYTES = 64 * MiB
"""The same for memory."""
_MAX_SIEGES = 3
"""Engines' memory goes up and down by as much with what those clients ask: 93 MiB in a minute that nobody attacked in.
Whoever makes them keep memory from outside can do so every time."""
_MAX_LINES_PER_S = 1.0
"""Of one process; each listener may write one in ten seconds."""
_REFUSED = re.compile(r"pid=(\d+)[^\n]*refused (?:connections|messages|KV connections): (\d+)")


def besiege(cluster: RunningCluster, pids: Iterable[int], secret: bytes) -> dict[str, float]:
    """Attack these processes' listeners, one attack after the other; what it came to.

    Raises `DrillError` if a process ended, kept descriptors or memory, or did not say whom it refused, or too often.
    """
    pids = tuple(pids)
    listeners = listeners_of(pids)
    silent = set(pids) - {listener.pid for listener in listeners}
    if silent:
        raise DrillError(f"no listener of processes {sorted(silent)} was found")
    descriptors = {pid: num_descriptors(pid) for pid in pids}
    began_s = time.monotonic()
    num_attempts = 0
    grown: list[int] = []
    with _Peak(descriptors) as peak:
        while not grown or (grown[-1] > _SPARE_BYTES and len(grown) < _MAX_SIEGES):
            memory = {pid: resident_bytes(pid) for pid in pids}
            num_attempts += sum(attack(listener, secret) for attack in ATTACKS for listener in listeners)
            cluster.wait_until(
                lambda: all(num_descriptors(pid) <= descriptors[pid] + _SPARE_DESCRIPTORS for pid in pids),
                what="as many descriptors as before",
                timeout_s=_CALM_TIMEOUT_S,
            )
            grown.append(max(resident_bytes(pid) - memory[pid] for pid in pids))
    if grown[-1] > _SPARE_BYTES:
        raise DrillError(f"memory grew every time, MiB: {[round(num_bytes / MiB) for num_bytes in grown]}")
    notes = {
        "num_listeners": len(listeners),
        "num_sieges": len(grown),
        "num_attempts": num_attempts,
        "most_descriptors": peak.num_more,
        "memory_mib": round(grown[-1] / MiB, 1),
    }
    return notes | _log_lines(cluster, listeners, time.monotonic() - began_s)


class _Peak:
    """The most descriptors that any of these processes had, above the number given, during a `with` block."""

    def __init__(self, descriptors: dict[int, int]) -> None:
        self._descriptors = descriptors
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="drill-peak", daemon=True)
        self.num_more = 0

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(_PEAK_PERIOD_S):
            self.num_more = max(
                self.num_more, *(num_descriptors(pid) - before for pid, before in self._descriptors.items())
            )


def _log_lines(cluster: RunningCluster, listeners: list[Listener], seconds: float) -> dict[str, float]:
    """Lines about refusals, and how many refusals they tell of; nothing without a log."""
    if cluster.log is None:
        return {}
    pids = {str(listener.pid) for listener in listeners}

    def told() -> list[tuple[str, str]]:
        assert cluster.log is not None
        return [found for found in _REFUSED.findall(cluster.log.read_text(errors="replace")) if found[0] in pids]

    cluster.wait_until(
        lambda: {pid for pid, _ in told()} == pids, what="every process has said whom it refused", timeout_s=15.0
    )
    lines = told()
    if len(lines) > _MAX_LINES_PER_S * seconds * len(pids):
        raise DrillError(f"{len(lines)} lines about refusals in {seconds:.0f} s")
    return {"num_log_lines": len(lines), "num_told": sum(int(number) for _, number in lines)}
