from __future__ import annotations

import ctypes
import sys
import threading

import pytest

from atom_cluster.platform.timers import wake_on_time


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked")
def test_a_threads_sleeps_end_on_time_where_it_asked_for_that() -> None:
    set_timer_slack, get_timer_slack = 29, 30  # of linux/prctl.h
    slack_ns: list[int] = []

    def look() -> None:
        ctypes.CDLL(None).prctl(set_timer_slack, 50_000, 0, 0, 0)
        wake_on_time()
        slack_ns.append(ctypes.CDLL(None).prctl(get_timer_slack, 0, 0, 0, 0))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert slack_ns == [1000]
