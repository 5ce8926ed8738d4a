"""What steps are recorded as: time and tokens by kind, how they were run, what the device waited for the host.

Knows nothing of what is in a step but counts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from atom_cluster.engine.reporting import count_admissions
from atom_cluster.engine.scheduler import ScheduledRow, ScheduledStep
from atom_cluster.messages.start import StartFacts
from atom_cluster.messages.steps import StepResult
from atom_cluster.observability.metrics import (
    CHOICE_INFO,
    DEVICE_WAIT_S,
    GRAPH_CAPTURE_S,
    GRAPHS_CAPTURED,
    KERNELS_COMPILED,
    MEMORY_BYTES,
    START_S,
    STEP_S,
    STEP_TOKENS,
    STEPS,
    MetricSink,
)

_log = logging.getLogger(__name__)

_WORTH_TELLING_S = 0.1
MAX_CHOICE_LENGTH = 120
"""Characters of a choice's reason in a label."""


def step_kind(rows: Sequence[ScheduledRow]) -> str:
    """prefill, decode or mixed. A prompt whose last token alone was missing decodes."""
    num_prompts = sum(row.num_prompt_tokens > 0 for row in rows)
    if not num_prompts:
        return "decode"
    return "prefill" if num_prompts == len(rows) else "mixed"


class StepMeter:
    """Follows plans from their submission to their results, which come in the same order."""

    def __init__(self, metrics: MetricSink, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._submitted_s: deque[float] = deque()
        self._last_result_s = clock()

    def submitted(self, step: ScheduledStep) -> None:
        """A plan went to the runner."""
        self._submitted_s.append(self._clock())
        count_admissions(step, self._metrics)

    def collected(self, rows: Sequence[ScheduledRow], result: StepResult) -> None:
        """The result of the oldest plan came."""
        now_s = self._clock()
        could_begin_s = max(self._submitted_s.popleft(), self._last_result_s)
        self._last_result_s = now_s
        if not rows:
            return
        kind = step_kind(rows)
        self._metrics.observe(STEP_S, result.run_s, kind=kind)
        self._metrics.observe(STEP_TOKENS, sum(row.num_tokens for row in rows), kind=kind)
        self._metrics.inc(STEPS, execution=result.execution)
        if result.compiled:
            self._metrics.inc(KERNELS_COMPILED, len(result.compiled))
            seconds = sum(seconds for _, seconds in result.compiled)
            if seconds > _WORTH_TELLING_S:
                names = ", ".join(sorted({name for name, _ in result.compiled}))
                _log.warning("a step with %d rows waited %.1f s for kernels: %s", len(rows), seconds, names)
        self._metrics.inc(DEVICE_WAIT_S, max(0.0, now_s - could_begin_s - result.run_s))


def record_start(start: StartFacts, choices: dict[str, str], metrics: MetricSink) -> None:
    """What is known once a runner has started, and does not change."""
    for use, num_bytes in (("weights", start.weight_bytes), ("kv", start.kv_bytes), ("graphs", start.graph_bytes)):
        metrics.set(MEMORY_BYTES, num_bytes, use=use)
    metrics.set(GRAPHS_CAPTURED, start.num_graphs, kind="graph")
    metrics.set(GRAPHS_CAPTURED, start.num_pieces, kind="pieces")
    metrics.set(GRAPH_CAPTURE_S, start.capture_s)
    for part, seconds in start.parts_s.items():
        metrics.set(START_S, seconds, part=part)
    for choice, value in choices.items():
        metrics.set(CHOICE_INFO, 1, choice=choice, setting=value[:MAX_CHOICE_LENGTH])
