"""StepProfiler: traces of the steps of one rank, while a window is open. Knows plans and files; knows no model.

A window records what the thread that issues steps does, and what the device does for it, with `torch.profiler`. Steps
carry labels then, which `atom-cluster trace` reads: `decode[bs=32 q=1 ctx=16384]`, `prefill[tokens=512 rows=2
ctx=512]`, `mixed[tokens=544 bs=32 rows=1 ctx=16896]` and, inside of one that is no graph, `draft[bs=32 k=3]`. bs: rows
that decode, q: most tokens of one of them, rows: those that compute prompts, ctx: tokens of all rows up to the end of
the step.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from atom_cluster.config.observability import ProfileConfig
from atom_cluster.errors import ConfigError
from atom_cluster.messages.profile import CloseWindow, OpenWindow, WindowCommand, WindowWritten
from atom_cluster.messages.steps import RowStep, StepPlan
from atom_cluster.messages.transfer import RankReport
from atom_cluster.ops.sampling import Draw
from atom_cluster.runner.drafter import Drafter
from atom_cluster.runner.inputs import StepInputs

_log = logging.getLogger(__name__)

_CLOSED: AbstractContextManager[None] = nullcontext()
_CLOSE_S = 60.0
"""How long a rank that ends waits for a trace that is being written."""


@dataclass(slots=True)
class _Window:
    command: OpenWindow
    profile: profile
    num_steps_left: int


class StepProfiler:
    """One rank's windows, one after the other. All calls from the thread that issues steps, but `poll` and `close`."""

    def __init__(self, config: ProfileConfig, *, rank: int, device: torch.device) -> None:
        """Raises ConfigError when the directory cannot be written to."""
        self._config = config
        self._rank = rank
        self._device = device
        self._window: _Window | None = None
        self._writer: threading.Thread | None = None
        self._reports: queue.SimpleQueue[RankReport] = queue.SimpleQueue()
        if config.directory is not None:
            _make_directory(Path(config.directory))

    @property
    def is_open(self) -> bool:
        """Whether steps are being recorded."""
        return self._window is not None

    def around(self, plan: StepPlan) -> AbstractContextManager[None]:
        """To be held while a plan's work is issued. Opens and closes windows as the plan says."""
        if self._window is None and plan.profile is None:
            return _CLOSED
        return _Around(self, plan)

    def span(self, label: Callable[[], str]) -> AbstractContextManager[object]:
        """A labelled part of the trace; nothing, and `label` is not called, while no window is open."""
        return _CLOSED if self._window is None else record_function(label())

    def execute(self, command: WindowCommand) -> None:
        """Open or close a window. What cannot be done becomes a report, never an error of the step."""
        if isinstance(command, CloseWindow):
            if self._window is not None and self._window.command.window_id == command.window_id:
                self._end()
            return
        try:
            self._begin(command)
        except Exception as exc:  # noqa: BLE001 - whoever asked for the window is told; steps go on without it
            _log.warning("no window was opened: %s", exc)
            self._report(command, error=f"the profiler did not start: {exc}")

    def count_step(self) -> None:
        """A step was issued; maybe the window's last."""
        window = self._window
        if window is None:
            return
        window.num_steps_left -= 1
        if window.num_steps_left <= 0:
            self._end()

    def poll(self) -> list[RankReport]:
        """What became of windows since the last call. From any one thread."""
        reports = []
        while not self._reports.empty():
            reports.append(self._reports.get_nowait())
        return reports

    def close(self) -> None:
        """Drop the open window, if any, and wait for the trace that is being written. Idempotent."""
        window, self._window = self._window, None
        if window is not None:
            _log.warning("a window was open when the rank ended; its trace is dropped")
            try:
                window.profile.stop()
            except Exception as exc:  # noqa: BLE001 - another thread had started it, which is gone
                _log.info("the profiler did not stop: %s", exc)
        if self._writer is not None:
            self._writer.join(_CLOSE_S)

    def _begin(self, command: OpenWindow) -> None:
        if self._window is not None:
            raise RuntimeError(f"window {self._window.command.window_id} is open")
        config = self._config
        activities = [ProfilerActivity.CPU]
        if self._device.type != "cpu":
            activities.append(ProfilerActivity.CUDA)
        recording = profile(
            activities=activities,
            with_stack=config.with_stack if command.with_stack is None else command.with_stack,
            record_shapes=config.record_shapes if command.record_shapes is None else command.record_shapes,
            acc_events=True,  # there is one cycle, and torch warns that events of others would be lost
        )
        recording.start()
        limit = config.max_steps
        num_steps = limit if command.num_steps is None else min(command.num_steps, limit)
        self._window = _Window(command, recording, num_steps)

    def _end(self) -> None:
        """Stop recording; a thread writes the trace, since that takes long."""
        window, self._window = self._window, None
        assert window is not None
        try:
            if self._device.type != "cpu":
                torch.cuda.synchronize(self._device)
            window.profile.stop()
        except Exception as exc:  # noqa: BLE001 - as in `execute`
            self._report(window.command, error=f"the profiler did not stop: {exc}")
            return
        self._writer = threading.Thread(target=self._write, args=(window,), name="trace-writer", daemon=True)
        self._writer.start()

    def _write(self, window: _Window) -> None:
        command = window.command
        directory = Path(self._config.directory or ".")
        name = f"{command.replica}_rank{self._rank}_{command.time}.pt.trace.json.gz"
        partial = directory / f".{name}"
        try:
            window.profile.export_chrome_trace(str(partial))
            os.replace(partial, directory / name)
        except Exception as exc:  # noqa: BLE001 - reported; a full disk must not end the rank
            _log.warning("the trace %s was not written: %s", name, exc)
            partial.unlink(missing_ok=True)
            self._report(command, error=f"the trace was not written: {exc}")
            return
        self._report(command, files=(str(directory / name),))

    def _report(self, command: OpenWindow, *, files: tuple[str, ...] = (), error: str | None = None) -> None:
        written = WindowWritten(window_id=command.window_id, files=files, error=error)
        self._reports.put(RankReport(rank=self._rank, report=written))


class _Around:
    """See `StepProfiler.around`."""

    def __init__(self, profiler: StepProfiler, plan: StepPlan) -> None:
        self._profiler = profiler
        self._plan = plan
        self._span: AbstractContextManager[object] = _CLOSED

    def __enter__(self) -> None:
        if self._plan.profile is not None:
            self._profiler.execute(self._plan.profile)
        if self._plan.rows:
            self._span = self._profiler.span(lambda: label_of(self._plan.rows))
        self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, traceback)
        if self._plan.rows:
            self._profiler.count_step()


class LabelledDrafter:
    """A `Drafter` around another one, whose drafting is labelled in traces."""

    def __init__(self, inner: Drafter, profiler: StepProfiler, num_drafts: int) -> None:
        self._inner = inner
        self._profiler = profiler
        self._num_drafts = num_drafts

    def draft(self, inputs: StepInputs, hidden_TD: torch.Tensor, num_kept_S: torch.Tensor, draw: Draw) -> torch.Tensor:
        """See `Drafter`."""
        with self._profiler.span(lambda: f"draft[bs={len(inputs.layout.sampling)} k={self._num_drafts}]"):
            return self._inner.draft(inputs, hidden_TD, num_kept_S, draw)


def label_of(rows: Sequence[RowStep]) -> str:
    """What a step is, in a word and its sizes."""
    decoding = [row for row in rows if row.samples and row.num_tokens == row.num_drafts + 1]
    context = sum(row.start + row.num_tokens for row in rows)
    num_tokens = sum(row.num_tokens for row in rows)
    num_prompts = len(rows) - len(decoding)
    if not num_prompts:
        return f"decode[bs={len(rows)} q={max(row.num_tokens for row in rows)} ctx={context}]"
    if not decoding:
        return f"prefill[tokens={num_tokens} rows={num_prompts} ctx={context}]"
    return f"mixed[tokens={num_tokens} bs={len(decoding)} rows={num_prompts} ctx={context}]"


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigError(f"observability.profile.directory: traces cannot be written to {directory}: {exc}") from exc
