"""LoadView: reports and placements add up, and a placement is counted once."""

from __future__ import annotations

import math

import pytest

from atom_cluster.routing.load_view import RECENT_S, SETTLE_S, Leg, LoadView
from tests.routing.builders import make_load

_PERIOD_S = 0.1


@pytest.fixture
def view() -> LoadView:
    return LoadView(load_period_s=_PERIOD_S)


def _leg(peer_id: str, *, requests: int = 1, tokens: int = 100, blocks: int = 7) -> Leg:
    return Leg(peer_id=peer_id, num_requests=requests, num_tokens=tokens, num_blocks=blocks, work_tokens=tokens)


def test_an_unknown_replica_is_idle(view: LoadView) -> None:
    estimate = view.estimate("a", 5.0)
    assert (estimate.num_requests, estimate.num_waiting_tokens, estimate.num_free_blocks) == (0, 0, None)


def test_placements_since_the_report_are_added_to_it(view: LoadView) -> None:
    view.report(make_load("a", running=3, waiting_tokens=50, free_blocks=10), 1.0)
    view.place(("ingress", 1), [_leg("a"), _leg("b", requests=0)], 1.2)
    estimate = view.estimate("a", 1.25)
    assert (estimate.num_requests, estimate.num_waiting_tokens, estimate.num_free_blocks) == (4, 150, 3)
    assert estimate.age_s == pytest.approx(0.25)
    assert view.estimate("b", 1.25).num_requests == 0
    assert view.estimate("b", 1.25).num_waiting_tokens == 100


def test_free_blocks_do_not_go_below_zero(view: LoadView) -> None:
    view.report(make_load("a", free_blocks=3), 1.0)
    view.place(("ingress", 1), [_leg("a", blocks=7)], 1.2)
    assert view.estimate("a", 1.2).num_free_blocks == 0


def test_a_later_report_includes_the_placement(view: LoadView) -> None:
    view.place(("ingress", 1), [_leg("a")], 1.0)
    view.report(make_load("a", running=1), 1.0 + 2 * SETTLE_S)
    assert view.estimate("a", 1.2).num_requests == 1
    assert view.num_placements == 0


def test_a_report_that_crossed_the_request_does_not_hide_it(view: LoadView) -> None:
    view.place(("ingress", 1), [_leg("a")], 1.0)
    view.report(make_load("a", running=0), 1.0 + SETTLE_S / 2)
    assert view.estimate("a", 1.0 + SETTLE_S).num_requests == 1


def test_a_report_that_came_at_once_and_last_did_include_it(view: LoadView) -> None:
    view.place(("ingress", 1), [_leg("a")], 1.0)
    view.report(make_load("a", running=1), 1.0 + SETTLE_S / 2)
    assert view.estimate("a", 1.0 + 3 * _PERIOD_S).num_requests == 1


def test_a_replica_that_reports_nothing_keeps_its_placements(view: LoadView) -> None:
    view.report(make_load("a"), 0.5)
    for query_id in range(5):
        view.place(("ingress", query_id), [_leg("a")], 1.0)
    assert view.estimate("a", 60.0).num_requests == 5
    view.done(("ingress", 3))
    view.done(("ingress", 3))
    assert view.estimate("a", 60.0).num_requests == 4


def test_a_lost_ingress_takes_its_placements_along(view: LoadView) -> None:
    view.place(("one", 1), [_leg("a"), _leg("b")], 1.0)
    view.place(("other", 1), [_leg("a")], 1.0)
    view.drop_source("one")
    assert view.estimate("a", 1.0).num_requests == 1
    assert view.estimate("b", 1.0).num_requests == 0
    assert view.num_placements == 1


def test_a_forgotten_replica_leaves_nothing(view: LoadView) -> None:
    view.report(make_load("a", running=9), 1.0)
    view.place(("ingress", 1), [_leg("a"), _leg("b")], 1.0)
    view.forget("a")
    assert view.estimate("a", 1.0).num_requests == 0
    assert view.estimate("b", 1.0).num_requests == 1
    view.done(("ingress", 1))
    assert view.num_placements == 0


def test_recent_work_outlives_the_request_and_decays(view: LoadView) -> None:
    view.place(("ingress", 1), [_leg("a", tokens=1000)], 0.0)
    view.done(("ingress", 1))
    view.place(("ingress", 2), [_leg("a", tokens=1000)], RECENT_S)
    assert view.estimate("a", RECENT_S).recent_tokens == pytest.approx(1000 + 1000 * math.exp(-1))
    assert view.estimate("a", 20 * RECENT_S).recent_tokens < 1e-3
