from __future__ import annotations

import msgspec
import pytest

from atom_cluster.engine.grammar_desk import GrammarDesk
from atom_cluster.engine.open_requests import OpenRequests
from atom_cluster.engine.replies import Replies
from atom_cluster.engine.request import Phase, Request
from atom_cluster.errors import EngineLost, NotReady, RequestFailed
from atom_cluster.messages.requests import GrammarSpec, TokenBatch
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import REQUESTS_FINISHED, REQUESTS_MOVED
from tests.factories import make_request, make_scheduler
from tests.fakes import ListOutbox, VirtualClock


class Rig:
    """Requests that wait and hold a block each, one of which is at prefill."""

    def __init__(self) -> None:
        self.outbox, self.metrics = ListOutbox(), MemoryMetrics()
        self.scheduler, self.blocks = make_scheduler()
        self.cancelled: list[Request] = []
        self.replies = Replies(self.outbox, self.metrics, VirtualClock())
        self.open = OpenRequests(
            scheduler=self.scheduler, blocks=self.blocks, replies=self.replies, cancel_remote=self.cancelled.append
        )
        self.here, self.remote, self.other = (make_request(number) for number in range(3))
        self.other.client = "somebody else"
        for request, deadline_s in ((self.here, 5.0), (self.remote, 7.0), (self.other, None)):
            self.open.add(request, deadline_s=deadline_s)
            if request is self.remote:
                request.phase = Phase.REMOTE
            else:
                self.scheduler.add(request)
                request.table = self.blocks.match(request.tokens, "running")
                self.blocks.extend(request.table, 4)

    @property
    def num_held(self) -> int:
        return self.blocks.pool.counts_by_name()["running"]

    def heard(self) -> dict[str, str | None]:
        """Last words by request."""
        self.replies.flush()
        deltas = [d for _, message in self.outbox.sent if isinstance(message, TokenBatch) for d in message.deltas]
        return {delta.request_id: None if delta.error is None else delta.error.kind for delta in deltas}


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_only_who_sent_a_request_cancels_it_and_nobody_hears_of_it(rig: Rig) -> None:
    rig.open.cancel("somebody else", "r0")
    rig.open.cancel("client", "unknown")
    assert (len(rig.open), rig.num_held) == (3, 2)
    rig.open.cancel("client", "r0")
    rig.open.cancel("client", "r0")
    assert ("r0" in rig.open, rig.here.is_done, rig.num_held) == (False, True, 1)
    assert rig.metrics.value(REQUESTS_FINISHED, reason="abort") == 1
    assert rig.heard() == {}


def test_all_requests_of_a_client_that_is_gone_end(rig: Rig) -> None:
    rig.open.drop_client("client")
    assert rig.open.all() == [rig.other]
    assert (rig.cancelled, rig.num_held) == ([rig.remote], 1)
    assert rig.heard() == {}


def test_a_request_that_fails_or_moves_ends_with_a_word(rig: Rig) -> None:
    rig.open.fail(rig.remote, RequestFailed("no"))
    rig.open.move(rig.here, NotReady("elsewhere"))
    assert (rig.cancelled, rig.num_held, len(rig.open)) == ([rig.remote], 1, 1)
    assert rig.heard() == {"r0": "NotReady", "r1": "RequestFailed"}
    assert rig.metrics.value(REQUESTS_MOVED) == 1


def test_a_deadline_is_of_one_request_and_not_of_the_next_with_its_id(rig: Rig) -> None:
    rig.open.finish(rig.here)
    again = make_request(9)
    again.request_id = "r0"
    rig.scheduler.add(again)
    rig.open.add(again, deadline_s=100.0)
    rig.open.expire(6.9)
    assert rig.heard() == {}
    rig.open.expire(7.0)
    assert rig.heard() == {"r1": "RequestTimeout"}
    rig.open.expire(100.0)
    assert rig.open.all() == [rig.other]


def test_a_request_whose_first_token_was_all_leaves_its_ticket_to_the_caller(rig: Rig) -> None:
    rig.open.finish(rig.remote)
    assert (rig.remote.is_done, rig.cancelled) == (True, [])
    assert "r1" not in rig.open


def test_everybody_is_told_when_the_engine_ends(rig: Rig) -> None:
    rig.open.tell_all(EngineLost("gone"))
    assert rig.heard() == dict.fromkeys(("r0", "r1", "r2"), "EngineLost")


def test_a_request_that_is_over_uses_no_grammar(rig: Rig) -> None:
    desk = GrammarDesk(num_rows=4, metrics=rig.metrics, clock=VirtualClock())
    for request in rig.open.all():
        grammar = GrammarSpec(kind="json_object")
        request.sampling = msgspec.structs.replace(request.sampling, grammar=grammar)
        desk.open(request)
    assert rig.here.grammar is not None
    users = rig.here.grammar.users
    rig.open.finish(rig.remote)
    rig.open.cancel("client", "r0")
    assert users == {rig.other}
