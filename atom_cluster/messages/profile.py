"""Profiler windows: traces of the steps that an engine runs between a start and a stop, one file per rank.

A client asks an engine (`StartProfile`, `StopProfile`), which answers each with a `ProfileAnswer`. The engine tells its
ranks inside step plans, so that all of them record the same steps, and every rank says once when its trace is written.
"""

from __future__ import annotations

from msgspec import Struct


class StartProfile(Struct, frozen=True, kw_only=True, tag="start_profile"):
    """Begin a window. Answered at once; refused while there is one."""

    call_id: int
    """Of the sender's choice, for the answer."""
    num_steps: int | None = None
    """The window ends by itself after so many steps; None: after as many as are configured."""
    with_stack: bool | None = None
    """None: as configured."""
    record_shapes: bool | None = None
    """None: as configured."""


class StopProfile(Struct, frozen=True, kw_only=True, tag="stop_profile"):
    """End the window, or take the traces of one that has ended by itself. Answered when they are written."""

    call_id: int


class ProfileAnswer(Struct, frozen=True, kw_only=True, tag="profile_answer"):
    """Answer to either."""

    call_id: int
    files: tuple[str, ...] = ()
    """Traces, in order of rank, each on the host of its rank; of a stop only."""
    error: str | None = None
    """Why it was refused, or what became of the traces that are missing."""


# --- engine -> ranks, inside a StepPlan ---------------------------------------------------------------------------


class OpenWindow(Struct, frozen=True, kw_only=True, tag="open_window"):
    """Record this plan's step and those behind it. Ends, however it ends, with one `WindowWritten`."""

    window_id: int
    replica: str
    """First part of the name of the trace file."""
    time: str
    """Last part of it."""
    num_steps: int | None
    with_stack: bool | None
    record_shapes: bool | None


class CloseWindow(Struct, frozen=True, kw_only=True, tag="close_window"):
    """Record no more, beginning with this plan's step. Nothing happens if the window has ended by itself."""

    window_id: int


WindowCommand = OpenWindow | CloseWindow


# --- ranks -> engine ----------------------------------------------------------------------------------------------


class WindowWritten(Struct, frozen=True, kw_only=True, tag="window_written"):
    """A window is over and its traces are written; combined over ranks."""

    window_id: int
    files: tuple[str, ...] = ()
    error: str | None = None
