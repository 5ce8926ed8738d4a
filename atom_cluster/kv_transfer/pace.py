"""How long to let transports work before they are asked again what is done. Knows no transport.

Asking costs little, but a thread that asks without end takes the interpreter from the one that feeds the device. So the
pauses grow with what was waited for already: an answer comes late by a small share of that, be it a prompt's read of a
millisecond or of a hundred. Only at first there are none, for reads of a few blocks.
"""

from __future__ import annotations

import time

_WITHOUT_PAUSE_S = 0.0001
_LONGEST_S = 0.0005
"""Transports are driven by being asked: a link should not run dry between."""
_SHARE = 32
"""A pause is this part of what was waited for."""


class PollPace:
    """Of one thread that waits for reads."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def restart(self) -> None:
        """Something began or ended."""
        self._since_s = time.monotonic()

    @property
    def pause_s(self) -> float:
        """Seconds until it is worth asking again; 0: none."""
        waited_s = time.monotonic() - self._since_s
        if waited_s < _WITHOUT_PAUSE_S:
            return 0.0
        return min(waited_s / _SHARE, _LONGEST_S)
