from __future__ import annotations

import sys
import threading
import time

import pytest

from atom_cluster.gang.local_gang import _log_deaths
from tests.processes import forking


def end_behind(seconds: float, status: int) -> None:
    time.sleep(seconds)
    sys.exit(status)


def test_any_follower_that_dies_is_told_of_whichever_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    followers = [
        forking().Process(target=end_behind, args=(seconds, status), name=f"rank-{rank}", daemon=True)
        for rank, seconds, status in ((1, 60.0, 0), (2, 0.0, 3))
    ]
    for follower in followers:
        follower.start()
    threading.Thread(target=_log_deaths, args=(followers,), daemon=True).start()
    # Not joined here: whichever of two threads asks the system first is the one that learns the status.
    deadline_s = time.monotonic() + 60
    while not caplog.text and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert "rank-2 ended with status 3" in caplog.text
    followers[0].kill()
