"""RefusalLog: who is turned away is logged, and whoever knocks a thousand times a second cannot fill a disk with it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

_PERIOD_S = 10.0
_MAX_REASONS = 16
_OTHER = "other reasons"


class RefusalLog:
    """One line for the first refusal, then at most one per period with what has come since. Any thread may use it."""

    def __init__(
        self,
        logger: logging.Logger,
        what: str,
        *,
        period_s: float = _PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """what: is refused, as a plural: `connections`. Lines are warnings."""
        self._logger = logger
        self._what = what
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._last_source = ""
        self._next_line_s = float("-inf")

    def note(self, source: str | None, reason: str) -> None:
        """One more: who, if that is known, and why. Of reasons beyond 16 in one period only the number is told."""
        with self._lock:
            known = reason in self._counts or len(self._counts) < _MAX_REASONS
            self._counts[reason if known else _OTHER] += 1
            self._last_source = source or self._last_source
        self.flush()

    @property
    def is_pending(self) -> bool:
        """Whether something is still to be told."""
        return bool(self._counts)

    def flush(self) -> None:
        """Write what is due. To be called now and then, or the last refusals stay untold until the next one."""
        with self._lock:
            now_s = self._clock()
            if not self._counts or now_s < self._next_line_s:
                return
            counts, self._counts = self._counts, Counter()
            self._next_line_s = now_s + self._period_s
            source, self._last_source = self._last_source, ""
        who = f", the last from {source}" if source else ""
        why = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
        self._logger.warning("refused %s: %d%s: %s", self._what, counts.total(), who, why)
