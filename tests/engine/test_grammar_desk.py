from __future__ import annotations

import msgspec

from atom_cluster.engine.grammar_desk import MAX_PENDING, NUM_KEPT, GrammarDesk
from atom_cluster.engine.request import Request
from atom_cluster.messages.grammars import CompileGrammar, ForgetGrammar, GrammarReady
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import GRAMMAR_WAIT_S
from tests.factories import make_request, make_scheduler
from tests.fakes import VirtualClock

NUM_ROWS = 4


class Desk:
    """A desk, and requests with grammars that have numbers."""

    def __init__(self) -> None:
        self.metrics, self.clock = MemoryMetrics(), VirtualClock()
        self.desk = GrammarDesk(num_rows=NUM_ROWS, metrics=self.metrics, clock=self.clock)
        self.num_requests = 0

    def open(self, number: int | None, *, after: tuple[int, ...] = ()) -> Request:
        request = make_request(self.num_requests)
        self.num_requests += 1
        if number is not None:
            spec = GrammarSpec(kind="regex", text=f"a{{{number}}}", after=after)
            request.sampling = msgspec.structs.replace(request.sampling, grammar=spec)
        self.desk.open(request)
        return request

    def told(self) -> list[int]:
        """Ids of the next commands: those to compile, and with a minus those to forget, less 1."""
        commands = self.desk.take_commands()
        return [
            -command.grammar_id - 1 if isinstance(command, ForgetGrammar) else command.grammar_id
            for command in commands
        ]

    def ready(self, *grammar_ids: int) -> None:
        for grammar_id in grammar_ids:
            assert self.desk.on_ready(GrammarReady(grammar_id=grammar_id)) == []


def test_a_grammar_is_compiled_once_for_all_that_use_it_and_kept_behind_them() -> None:
    desk = Desk()
    first, second, other = desk.open(1), desk.open(1, after=(7,)), desk.open(2)
    assert first.sampling.grammar is not None
    commands = desk.desk.take_commands()
    assert commands[0] == CompileGrammar(grammar_id=0, spec=first.sampling.grammar)
    assert [command.grammar_id for command in commands] == [0, 1]
    assert desk.desk.is_waiting
    assert not any(request.may_sample for request in (first, second, other))
    desk.ready(0)
    assert (first.may_sample, second.may_sample, other.may_sample) == (True, True, False)
    first.end()
    second.end()
    assert desk.open(1).may_sample
    assert not desk.desk.has_commands


def test_the_time_that_requests_were_held_out_is_told_once_the_grammar_is_there() -> None:
    desk = Desk()
    first, second, never = desk.open(1), desk.open(1), desk.open(1)
    first.held_out_s = 0.0
    desk.clock.sleep(0.5)
    second.held_out_s = desk.clock()
    desk.clock.sleep(0.25)
    desk.ready(0)
    waits = desk.metrics.histogram(GRAMMAR_WAIT_S)
    assert (waits.count, waits.sum) == (2, 1.0)
    assert first.held_out_s is second.held_out_s is never.held_out_s is None


def test_a_request_without_a_grammar_waits_for_none() -> None:
    desk = Desk()
    assert desk.open(None).may_sample
    assert (desk.desk.has_commands, desk.desk.is_waiting) == (False, False)


def test_those_unused_longest_are_forgotten_when_there_are_many() -> None:
    desk = Desk()
    for number in range(NUM_KEPT):
        desk.open(number).end()
        desk.ready(number)
    used = desk.open(0)
    assert desk.told() == list(range(NUM_KEPT))
    desk.open(NUM_KEPT).end()
    assert desk.told() == [-2, NUM_KEPT]
    assert used.may_sample
    assert desk.open(0).may_sample
    assert not desk.open(1).may_sample


def test_a_failure_ends_all_that_use_it_in_order_and_is_not_kept() -> None:
    desk = Desk()
    requests = [desk.open(1) for _ in range(5)]
    requests[2].end()
    failed = desk.desk.on_ready(GrammarReady(grammar_id=0, error="no"))
    assert failed == [request for request in requests if request is not requests[2]]
    for request in failed:
        request.end()
    again = desk.open(1)
    assert not again.may_sample
    assert desk.told() == [0, -1, 1]
    desk.ready(1)
    assert again.may_sample


def test_so_many_are_compiled_at_a_time_and_the_others_when_asked_for_again() -> None:
    desk = Desk()
    requests = [desk.open(number) for number in range(MAX_PENDING + 2)]
    assert desk.told() == list(range(MAX_PENDING))
    late = requests[MAX_PENDING]
    desk.desk.begin(late)
    assert desk.told() == []
    desk.ready(5)
    desk.desk.begin(late)
    desk.desk.begin(late)
    desk.desk.begin(requests[-1])
    assert desk.told() == [MAX_PENDING]


def test_what_nobody_waits_for_any_more_keeps_nobody_waiting() -> None:
    desk = Desk()
    cancelled = [desk.open(number) for number in range(MAX_PENDING)]
    desk.told()
    for request in cancelled[1:]:
        request.end()
    wanted = desk.open(MAX_PENDING)
    assert desk.told() == [-number - 1 for number in range(1, MAX_PENDING)]
    assert desk.desk.on_ready(GrammarReady(grammar_id=1, error="it is not wanted any more")) == []
    desk.desk.begin(wanted)
    assert desk.told() == [MAX_PENDING]


def test_ranks_hold_so_many_but_for_those_whose_requests_hold_blocks() -> None:
    desk = Desk()
    requests = []
    for number in range(NUM_ROWS + NUM_KEPT):
        requests.append(desk.open(number))
        desk.ready(number)
    late, holder = desk.open(100), desk.open(101)
    _, blocks = make_scheduler()
    holder.table = blocks.match(holder.tokens, "running")
    blocks.extend(holder.table, 1)
    assert desk.told() == list(range(NUM_ROWS + NUM_KEPT))
    desk.desk.begin(late)
    desk.desk.begin(holder)
    assert desk.told() == [NUM_ROWS + NUM_KEPT]
    for request in requests[:3]:
        request.end()
    desk.desk.begin(late)
    assert desk.told()[-1] == NUM_ROWS + NUM_KEPT + 1


def test_grammars_that_were_never_compiled_leave_nothing_behind() -> None:
    desk = Desk()
    for number in range(10 * NUM_KEPT):
        desk.open(number).end()
    assert len(desk.desk._known) <= NUM_KEPT + 1
    assert len(desk.desk._held) <= NUM_KEPT + 1
