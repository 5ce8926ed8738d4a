"""Exceptions on their way: what an engine says of a request that failed, and what whoever hears it raises."""

from __future__ import annotations

from atom_cluster import errors
from atom_cluster.errors import AtomClusterError, InvalidRequest, Overloaded, RequestFailed
from atom_cluster.messages.requests import RequestError


def message_of(error: AtomClusterError) -> RequestError:
    """What is said of it."""
    return RequestError(
        kind=type(error).__name__,
        message=str(error),
        param=error.param if isinstance(error, InvalidRequest) else None,
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else None,
    )


def error_of(message: RequestError) -> AtomClusterError:
    """The exception that it stands for; RequestFailed for kinds unknown here."""
    kind = getattr(errors, message.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, AtomClusterError)):
        return RequestFailed(message.message)
    if issubclass(kind, InvalidRequest):
        return kind(message.message, param=message.param)
    if issubclass(kind, Overloaded):
        return kind(message.message, retry_after_s=message.retry_after_s or 1.0)
    return kind(message.message)
