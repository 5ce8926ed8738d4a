"""Errors that this process answered with: all are counted; those that no client is to blame for are kept, too."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from atom_cluster.errors import AtomClusterError, InvalidRequest, RateLimited
from atom_cluster.observability.metrics import HTTP_ERRORS, MetricSink
from atom_cluster.observability.recent_errors import RecentErrors


@dataclass(frozen=True, slots=True)
class ErrorLedger:
    """One per application: its `state.errors`."""

    metrics: MetricSink
    recent: RecentErrors = field(default_factory=RecentErrors)

    def note(self, error: BaseException) -> None:
        """An answer ended with this."""
        kind = type(error).__name__ if isinstance(error, AtomClusterError) else "internal"
        self.metrics.inc(HTTP_ERRORS, kind=kind)
        if not isinstance(error, InvalidRequest | RateLimited):
            # What is not one of ours may say anything.
            self.recent.note(kind, str(error) if isinstance(error, AtomClusterError) else type(error).__name__)


def note_error(scope: Scope, error: BaseException) -> None:
    """Note an error of an answer that had begun, which no handler of errors sees."""
    scope["app"].state.errors.note(error)
