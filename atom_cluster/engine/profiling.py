"""ProfileDesk: who asked an engine for a profiler window, and what they are told. Knows no trace and no rank.

One window at a time. It begins and ends with commands that ride in step plans; its traces are ready when the runner
says so, however it ended.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from atom_cluster.engine.protocols import Outbox
from atom_cluster.messages.profile import (
    CloseWindow,
    OpenWindow,
    ProfileAnswer,
    StartProfile,
    StopProfile,
    WindowCommand,
    WindowWritten,
)

_MAX_WAITING = 64
"""Calls that wait for one window's traces."""


def _local_time() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


@dataclass(slots=True)
class _Window:
    window_id: int
    is_closing: bool = False
    waiting: list[tuple[str, int]] = field(default_factory=list)
    """Who asked for its end, and the ids of their calls."""


class ProfileDesk:
    """See the module docstring. All calls from the engine's thread."""

    def __init__(
        self, *, refusal: str, replica: str, outbox: Outbox, local_time: Callable[[], str] = _local_time
    ) -> None:
        """refusal: why there are no windows; empty when there are. replica: the first part of the traces' names."""
        self._refusal = refusal
        self._replica = replica
        self._outbox = outbox
        self._local_time = local_time
        self._ids = itertools.count()
        self._window: _Window | None = None
        self._unclaimed: WindowWritten | None = None
        self._commands: deque[WindowCommand] = deque()

    @property
    def has_command(self) -> bool:
        """Whether there is something to put into the next plan."""
        return bool(self._commands)

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for traces."""
        return self._window is not None and bool(self._window.waiting)

    def take_command(self) -> WindowCommand | None:
        """What the next plan tells the ranks."""
        return self._commands.popleft() if self._commands else None

    def start(self, client: str, message: StartProfile) -> None:
        """Begin a window, or say why not."""
        if self._refusal:
            self._answer(client, message.call_id, error=self._refusal)
        elif self._window is not None:
            state = "traces are still being written" if self._window.is_closing else "a window is open already"
            self._answer(client, message.call_id, error=f"{state}: stop it first, and wait for the answer")
        else:
            self._window = _Window(next(self._ids))
            self._unclaimed = None
            self._commands.append(
                OpenWindow(
                    window_id=self._window.window_id,
                    replica=self._replica,
                    time=self._local_time(),
                    num_steps=message.num_steps,
                    with_stack=message.with_stack,
                    record_shapes=message.record_shapes,
                )
            )
            self._answer(client, message.call_id)

    def stop(self, client: str, message: StopProfile) -> None:
        """End the window; answered when its traces are written. Or answer with those of one that ended by itself."""
        window, unclaimed = self._window, self._unclaimed
        if self._refusal:
            self._answer(client, message.call_id, error=self._refusal)
        elif window is not None and len(window.waiting) < _MAX_WAITING:
            window.waiting.append((client, message.call_id))
            if not window.is_closing:
                window.is_closing = True
                self._commands.append(CloseWindow(window_id=window.window_id))
        elif window is not None:
            self._answer(client, message.call_id, error="too many wait for these traces already")
        elif unclaimed is not None:
            self._unclaimed = None
            self._answer(client, message.call_id, files=unclaimed.files, error=unclaimed.error)
        else:
            self._answer(client, message.call_id, error="no window is open: start one first")

    def on_written(self, report: WindowWritten) -> None:
        """A window is over on all ranks."""
        window = self._window
        if window is None or window.window_id != report.window_id:
            raise AssertionError(f"window {report.window_id} was written, which nobody opened")
        self._window = None
        for client, call_id in window.waiting:
            self._answer(client, call_id, files=report.files, error=report.error)
        if not window.waiting:
            self._unclaimed = report

    def fail(self, message: str) -> None:
        """The runner is unusable: whoever waits for traces gets none."""
        window, self._window = self._window, None
        self._refusal = message
        for client, call_id in () if window is None else window.waiting:
            self._answer(client, call_id, error=message)

    def _answer(self, client: str, call_id: int, *, files: tuple[str, ...] = (), error: str | None = None) -> None:
        self._outbox.send(client, ProfileAnswer(call_id=call_id, files=files, error=error))
