"""LocalRunner: the StepRunner of one rank in this process. Plans are executed while the engine plans the next one.

On CPUs a thread does it; torch releases the interpreter lock while it computes, so the two overlap. GPUs compute on
their own: there the engine's thread issues the work, since two threads would only hand the lock to each other. The only
file of `engine` that imports `runner`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.errors import AtomClusterError
from atom_cluster.kv_transfer.combine import ReportCombiner, merge_offers
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport, Report
from atom_cluster.runner.model_runner import LaunchedStep, ModelRunner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.units import Deadline

_LOOK_S = 20e-6
"""Pause between looks at a GPU that is still computing."""

_log = logging.getLogger(__name__)


def merge_rank_infos(infos: Sequence[RankInfo]) -> RunnerInfo:
    """What the engine sees of a gang whose ranks, in order of rank, are these. `choices` and `start` are rank 0's."""
    first = infos[0]
    offers = merge_offers([info.kv_descriptors for info in infos])
    return RunnerInfo(
        num_blocks=first.num_blocks,
        block_size=first.block_size,
        max_num_requests=first.max_num_requests,
        max_model_len=first.max_model_len,
        vocab_size=first.vocab_size,
        world_size=first.world_size,
        other_groups=first.other_groups,
        max_drafts=first.max_drafts,
        kv_offers=offers,
        kv_transports=tuple(offer.transport for offer in offers),
        fingerprint_fields=first.fingerprint_fields,
        choices=first.choices,
        start=first.start,
        profile_refusal=first.profile_refusal,
    )


class _Steps(Protocol):
    """Executes plans on a `ModelRunner`, which it owns, in order. As `engine.protocols.StepRunner`, but of one rank."""

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; returns before it has run."""
        ...

    def collect(self, timeout_s: float | None) -> StepResult | None:
        """The oldest result; None if it was not ready in time. Raises what the step raised."""
        ...

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports since the last call."""
        ...

    def close(self) -> None:
        """Let the step that is running end, drop the ones behind it and release the runner. Idempotent."""
        ...


class _DeviceSteps:
    """Issues plans on the calling thread, to a device that computes on its own."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._launched: deque[LaunchedStep | Exception] = deque()

    def submit(self, plan: StepPlan) -> None:
        if self._launched and isinstance(self._launched[-1], Exception):
            return  # the runner is unusable; `collect` will say why
        try:
            self._launched.append(self._runner.launch(plan))
        except Exception as exc:  # noqa: BLE001 - not swallowed: `collect` raises it
            _log.exception("step %d failed", plan.step_id)
            self._launched.append(exc)

    def collect(self, timeout_s: float | None) -> StepResult | None:
        if not self._launched:
            return None
        oldest = self._launched[0]
        if isinstance(oldest, Exception):
            raise oldest
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        while not oldest.is_done():
            if deadline is not None and deadline.has_passed:
                return None
            time.sleep(_LOOK_S)
        self._launched.popleft()
        return oldest.wait()

    def poll_kv(self) -> list[RankReport]:
        return self._runner.poll_kv()

    def close(self) -> None:
        for launched in self._launched:
            if isinstance(launched, LaunchedStep):
                with contextlib.suppress(RuntimeError):  # of a device that failed; there is nobody to tell any more
                    launched.wait()
        self._launched.clear()
        self._runner.close()


class _ThreadSteps:
    """Executes plans on a thread of its own."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[LaunchedStep | Exception] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model-runner", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self, timeout_s: float | None) -> StepResult | None:
        try:
            launched = self._launched.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(launched, Exception):
            raise launched
        return launched.wait()

    def poll_kv(self) -> list[RankReport]:
        return self._runner.poll_kv()

    def close(self) -> None:
        self._is_closed = True
        self._plans.put(None)
        self._thread.join()
        self._runner.close()

    def _work(self) -> None:
        """Supervisor of the thread: the first exception of a step ends it and is raised again by `collect`."""
        while not self._is_closed:
            plan = self._plans.get()
            if plan is None:
                return
            try:
                launched = self._runner.launch(plan)
            except Exception as exc:  # noqa: BLE001 - not swallowed: `collect` raises it in the engine
                _log.exception("step %d failed", plan.step_id)
                self._launched.put(exc)
                return
            self._launched.put(launched)


class LocalRunner:
    """A gang of one rank in this process; owns the `ModelRunner`. See `engine.protocols.StepRunner`."""

    def __init__(self, runner: ModelRunner) -> None:
        self._info = merge_rank_infos([runner.info])
        self._combiner = ReportCombiner(world_size=1)
        self._steps: _Steps = _DeviceSteps(runner) if runner.computes_alone else _ThreadSteps(runner)
        self._failure: Exception | None = None
        self._is_closed = False

    @property
    def info(self) -> RunnerInfo:
        """Constant over the runner's life."""
        return self._info

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; returns before it has run."""
        self._check_usable()
        self._steps.submit(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The oldest result; None if it was not ready in time. Raises what the step raised."""
        self._check_usable()
        try:
            return self._steps.collect(timeout_s)
        except Exception as exc:
            self._failure = exc
            raise

    def poll_kv(self) -> list[Report]:
        """Reports of KV commands, profiler windows and compilations of grammars that ended since the last call."""
        self._check_usable()
        combined = (self._combiner.add(report) for report in self._steps.poll_kv())
        return [report for report in combined if report is not None]

    def close(self) -> None:
        """Let the step that is running end and release the runner. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._steps.close()

    def _check_usable(self) -> None:
        if self._is_closed:
            raise AtomClusterError("the runner is closed")
        if self._failure is not None:
            raise AtomClusterError(f"the runner failed before: {self._failure}") from self._failure
