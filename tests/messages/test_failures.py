from __future__ import annotations

import pytest

from atom_cluster.errors import (
    AtomClusterError,
    ContextLengthExceeded,
    EngineLost,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RequestFailed,
)
from atom_cluster.messages.failures import error_of, message_of
from atom_cluster.messages.requests import RequestError


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="prompt"),
        ContextLengthExceeded("long", param="max_tokens"),
        Overloaded("full", retry_after_s=3.0),
        RateLimited("much", retry_after_s=0.5),
        EngineLost("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_back_as_what_they_were(error: AtomClusterError) -> None:
    back = error_of(message_of(error))
    assert (type(back), str(back)) == (type(error), str(error))
    for name in ("param", "retry_after_s", "http_status", "code"):
        assert getattr(back, name, None) == getattr(error, name, None)


@pytest.mark.parametrize("kind", ["NoSuchError", "annotations", "Exception"])
def test_a_kind_that_is_unknown_here_is_a_failure(kind: str) -> None:
    assert type(error_of(RequestError(kind=kind, message="?"))) is RequestFailed
