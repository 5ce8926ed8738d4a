"""How exactly the system wakes a thread."""

from __future__ import annotations

import contextlib
import ctypes

_PR_SET_TIMERSLACK = 29
"""Of linux/prctl.h."""
_SLACK_NS = 1000


def wake_on_time() -> None:
    """Have the system end pauses of the calling thread when they are over, not some 50 microseconds later.

    For threads that look time and again whether others are done. Threads and processes that it starts later inherit it.
    Linux only (PR_SET_TIMERSLACK); elsewhere, or where it is forbidden, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
