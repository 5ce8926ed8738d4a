"""One line per HTTP request, when it has ended: what it was, how it ended, how long it took, and who computed it.

Never a word of a prompt or of an answer, and no key but its name. Clients cannot fill a disk with what is refused to
them: of requests that end with an error status only so many a second have a line of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.refusals import RefusalLog
from atom_cluster.observability.timeline import RequestRecord

LOGGER = "atom_cluster.access"
MAX_REFUSED_LINES_PER_S = 20
"""Of requests that ended with a status from 400 on; the others are counted, in a line every ten seconds."""
_QUIET_ROUTES = ("/health", "/ready", "/metrics")
"""Asked every second or so by machines."""

Fields = dict[str, str | int | float]


class AccessLog:
    """Used from one thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logger = get_logger(LOGGER)
        self._refused = RefusalLog(logging.getLogger(LOGGER), "requests", clock=clock)
        self._second = 0
        self._num_lines = 0

    def write(self, record: RequestRecord) -> None:
        """The line of a request that has ended."""
        is_refused = record.status >= 400
        level = logging.DEBUG if record.route in _QUIET_ROUTES and not is_refused else logging.INFO
        if not self._logger.isEnabledFor(level):
            return
        if is_refused and not self._has_line_left():
            self._refused.note(None, f"{record.status} on {record.route}")
            return
        if self._refused.is_pending:
            self._refused.flush()
        self._logger.bind(**fields_of(record)).log(
            level, "%s %s %d in %.3f s", record.method, record.route, record.status, record.latency_s
        )

    def _has_line_left(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_lines = second, 0
        self._num_lines += 1
        return self._num_lines <= MAX_REFUSED_LINES_PER_S


def fields_of(record: RequestRecord) -> Fields:
    """What the line says besides its message; what does not apply is left out."""
    fields: Fields = {
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "total_s": round(record.latency_s, 6),
    }
    texts = {"id": record.answer_id, "key": record.key_name, "error": record.error}
    fields.update({name: text for name, text in texts.items() if text})
    if record.outputs:
        fields["prompt_tokens"] = record.num_prompt_tokens
        fields["output_tokens"] = record.num_output_tokens
        attempts = record.outputs[0].attempts
        if attempts and attempts[-1].engine:
            fields["engine"] = attempts[-1].engine
            fields["prefill"] = attempts[-1].prefill or "none"
        num_attempts = sum(len(output.attempts) for output in record.outputs)
        if num_attempts > len(record.outputs):
            fields["attempts"] = num_attempts
    if record.ttft_s is not None:
        fields["ttft_s"] = round(record.ttft_s, 6)
    return fields
