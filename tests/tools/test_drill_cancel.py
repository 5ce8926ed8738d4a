"""The drill that cancels: it finds the phase, leaves, and times until both engines are free, no sooner and no later."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from atom_cluster.messages.cluster import EngineStatus, PeerAddress
from atom_cluster.tools.drill import cancel
from atom_cluster.tools.drill.cancel import PHASES, Canceller, CancelTimes, Phase
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.watch import EngineWatch

FREE = EngineStatus(num_running=0, num_waiting=0, num_tickets=0, blocks_by_state={"free": 9, "cached": 3})
CLEAN_UP_S = 0.15
REPLICAS = [
    {"id": role, "role": role, "endpoint": "tcp://10.0.0.1:1", "epoch": 1, "status": None}
    for role in ("prefill", "decode")
]


class Engines(RunningCluster, EngineWatch):
    """Both engines: a request decodes until its client has been gone for `CLEAN_UP_S`. One object plays both parts."""

    def __init__(self) -> None:
        self.num_open = 0
        self.ended_s = 0.0
        self.never_busy = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                outer.num_open += 1
                self.connection.recv(1)
                outer.ended_s = time.monotonic()
                outer.num_open -= 1
                self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._serving = threading.Thread(target=self._server.serve_forever)
        self._serving.start()
        super().__init__(f"http://127.0.0.1:{self._server.server_port}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._serving.join()

    def get(self, path: str, *, timeout_s: float = 60.0) -> object:
        return {"/v1/models": {"data": [{"id": "m"}]}, "/v1/cluster": {"replicas": REPLICAS}}[path]

    def statuses(self, engines: Iterable[PeerAddress]) -> dict[str, EngineStatus]:
        is_busy = not self.never_busy and (self.num_open or time.monotonic() - self.ended_s < CLEAN_UP_S)
        busy = EngineStatus(num_running=1, num_waiting=0, num_tickets=0, blocks_by_state={"free": 8, "running": 1})
        return {"prefill": FREE, "decode": busy if is_busy else FREE}


@pytest.fixture
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.close()


def phase(name: str) -> Phase:
    return next(phase for phase in PHASES if phase.name == name)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_it_leaves_in_the_phase_and_times_until_both_are_free(engines: Engines, is_streaming: bool) -> None:
    times = Canceller(engines, engines).times(phase("decoding"), is_streaming=is_streaming, num_samples=3)
    assert len(times.seconds) == 3 and times.num_missed == 0
    assert all(seconds >= CLEAN_UP_S for seconds in times.seconds)


def test_a_phase_that_is_never_seen_is_an_error_that_names_it(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "_REACH_TIMEOUT_S", 0.05)
    with pytest.raises(DrillError, match="KV being read: missed 4 times"):
        Canceller(engines, engines).times(phase("KV being read"), is_streaming=True, num_samples=1)


def test_engines_that_never_get_free_are_an_error(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "_SETTLE_TIMEOUT_S", 0.05)
    with pytest.raises(DrillError, match="not free within"):
        Canceller(engines, engines).times(phase("decoding"), is_streaming=True, num_samples=1)


def test_it_wants_a_pair_of_engines(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "replicas", lambda: REPLICAS * 2)
    with pytest.raises(DrillError, match="one prefill and one decode"):
        Canceller(engines, engines)


def test_ninety_nine_of_a_hundred_must_be_within_a_second() -> None:
    good = CancelTimes(phase="p", is_streaming=True, seconds=(0.1,) * 199 + (5.0,), num_missed=0)
    assert good.holds and good.quantile(0.5) == 0.1 and good.seconds[-1] == 5.0
    bad = CancelTimes(phase="p", is_streaming=True, seconds=(0.1,) * 49 + (1.5,), num_missed=0)
    assert bad.quantile(0.99) == 1.5 and not bad.holds
    assert not CancelTimes(phase="p", is_streaming=True, seconds=(), num_missed=0).holds
    assert cancel.as_json(bad)["p99_s"] == 1.5 and "BROKEN" in cancel.line_of(bad)


def test_there_are_six_phases() -> None:
    assert len({phase.name for phase in PHASES}) == len(PHASES) == 6
