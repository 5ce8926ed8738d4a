from __future__ import annotations

import pytest

from atom_cluster.errors import ProtocolError
from atom_cluster.kv_transfer.handoff import DecodeState, DecodeTicket, DecodeTickets, PrefillTickets
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import SamplingParams, TokenDelta
from atom_cluster.messages.transfer import KvPlacement, KvPublication, PrefillOrder, ReadFinished

EPOCH = 9
FIRST_TOKEN = TokenDelta(request_id="r", first_index=0, token_ids=(1,))


def order(ticket_id: str = "t", lease_s: float = 10.0, num_tokens_held: int = 0) -> PrefillOrder:
    return PrefillOrder(
        ticket_id=ticket_id,
        request_id="r",
        token_ids=(1, 2, 3),
        sampling=SamplingParams(),
        eos_token_ids=(),
        num_tokens_held=num_tokens_held,
        lease_s=lease_s,
        fingerprint="",
        fingerprint_fields={},
        placement=KvPlacement(4, 1),
    )


def address(peer_id: str = "p") -> PeerAddress:
    return PeerAddress(peer_id=peer_id, endpoint="tcp://127.0.0.1:1", epoch=EPOCH)


def publication(
    first_block: int, num_blocks: int, *, epoch: int = EPOCH, first_token: TokenDelta | None = None, group: int = 0
) -> KvPublication:
    return KvPublication(
        ticket_id="t",
        epoch=epoch,
        first_block=first_block,
        block_ids=tuple(range(num_blocks)),
        tags=(),
        first_token=first_token,
        group=group,
    )


def open_ticket(tickets: DecodeTickets[str], *, num_tokens: int = 20, num_held: int = 0) -> DecodeTicket[str]:
    return tickets.open(
        "request",
        request_id="r",
        address=address(),
        num_tokens=num_tokens,
        num_tokens_held=4 * num_held,
        timeout_s=3.0,
        now_s=0.0,
    )


def receiving(
    tickets: DecodeTickets[str],
    *,
    num_tokens: int = 20,
    num_held: int = 0,
    other_columns: dict[int, range] | None = None,
) -> DecodeTicket[str]:
    ticket = open_ticket(tickets, num_tokens=num_tokens, num_held=num_held)
    accept(tickets, ticket, other_columns=other_columns)
    return ticket


def accept(
    tickets: DecodeTickets[str],
    ticket: DecodeTicket[str],
    *,
    block_size: int = 4,
    other_columns: dict[int, range] | None = None,
    now_s: float = 0.0,
) -> None:
    tickets.accept(
        ticket, peer="p/9", epoch=EPOCH, block_size=block_size, other_columns=other_columns or {}, now_s=now_s
    )


def take(tickets: DecodeTickets[str], ticket: DecodeTicket[str], message: KvPublication, *, now_s: float = 0.0) -> int:
    """Take a publication, and start to read it into columns of the same numbers."""
    tickets.take(ticket, message, now_s=now_s)
    return tickets.start_read(ticket, group=message.group, first_column=message.first_block)


# --- prefill's side


def test_a_lease_runs_from_the_order_and_from_each_renewal() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    ticket = tickets.open(order(), peer_id="d", request="request", block_size=4, now_s=100.0)
    assert tickets.expired(109.9) == []
    tickets.renew(["t", "unknown"], peer_id="d", now_s=109.9)
    assert tickets.expired(119.8) == []
    assert tickets.expired(119.9) == [ticket]
    assert len(tickets) == 0


def test_a_ticket_is_given_back_once() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    ticket = tickets.open(order(), peer_id="d", request="request", block_size=4, now_s=0.0)
    assert tickets.release(["t", "t"], peer_id="d") == [ticket]
    assert tickets.release(["t"], peer_id="d") == []
    assert tickets.expired(1000.0) == []


def test_nobody_speaks_for_the_tickets_of_another_engine() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    tickets.open(order(), peer_id="d", request="request", block_size=4, now_s=0.0)
    assert tickets.release(["t"], peer_id="other") == []
    tickets.renew(["t"], peer_id="other", now_s=9.0)
    assert len(tickets.expired(10.0)) == 1


def test_an_order_that_comes_twice_is_refused() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    tickets.open(order(), peer_id="d", request="request", block_size=4, now_s=0.0)
    with pytest.raises(ProtocolError, match="ticket t is open already"):
        tickets.open(order(), peer_id="d", request="request", block_size=4, now_s=0.0)


def test_publishing_begins_after_the_blocks_that_decode_has() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    assert (
        tickets.open(order(num_tokens_held=12), peer_id="d", request="request", block_size=4, now_s=0.0).next_block == 3
    )


def test_tickets_are_found_by_the_engine_that_opened_them() -> None:
    tickets: PrefillTickets[str] = PrefillTickets()
    for number in range(4):
        tickets.open(order(f"t{number}"), peer_id=f"d{number % 2}", request="request", block_size=4, now_s=0.0)
    assert [ticket.order.ticket_id for ticket in tickets.of_peer("d1")] == ["t1", "t3"]
    assert len(tickets.all()) == 4


# --- decode's side


def test_ticket_ids_are_never_the_same_again() -> None:
    tickets, restarted = DecodeTickets[str](1), DecodeTickets[str](2)
    ids = [open_ticket(tickets).ticket_id, open_ticket(tickets).ticket_id, open_ticket(restarted).ticket_id]
    assert len(set(ids)) == 3


def test_a_ticket_is_complete_when_all_blocks_are_read_and_the_first_token_is_there() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets, num_tokens=20, num_held=1)
    first = take(tickets, ticket, publication(1, 2), now_s=0.0)
    last = take(tickets, ticket, publication(3, 2, first_token=FIRST_TOKEN), now_s=0.0)
    assert tickets.num_reads == 2
    assert tickets.finish_read(ReadFinished(read_id=last), now_s=0.0) is ticket
    assert not ticket.is_complete
    tickets.finish_read(ReadFinished(read_id=first), now_s=0.0)
    assert ticket.is_complete
    tickets.close(ticket)
    assert len(tickets) == tickets.num_reads == 0


def test_bad_blocks_are_counted_from_the_start_of_the_prompt() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    take(tickets, ticket, publication(0, 2))
    read_id = take(tickets, ticket, publication(2, 3), now_s=0.0)
    tickets.finish_read(ReadFinished(read_id=read_id, bad_blocks=(0, 2)), now_s=0.0)
    assert ticket.bad_pages == [(0, 2), (0, 4)]


def test_other_groups_are_published_once_each_before_or_with_the_first_token() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets, other_columns={1: range(3, 5), 2: range(1)})
    reads = [take(tickets, ticket, publication(3, 2, group=1))]
    reads.append(take(tickets, ticket, publication(0, 5)))
    reads.append(take(tickets, ticket, publication(0, 1, group=2, first_token=FIRST_TOKEN)))
    for read_id in reads:
        assert not ticket.is_complete
        tickets.finish_read(ReadFinished(read_id=read_id, bad_blocks=(0,)), now_s=0.0)
    assert ticket.is_complete
    assert ticket.bad_pages == [(1, 3), (0, 0), (2, 0)]


@pytest.mark.parametrize(
    "bad",
    [
        publication(2, 3, group=1),
        publication(3, 1, group=1),
        publication(0, 1, group=3),
        publication(0, 5, first_token=FIRST_TOKEN),
    ],
    ids=["other columns", "too few columns", "no such group", "first token before the other groups"],
)
def test_a_publication_of_other_groups_that_cannot_be_right_is_refused(bad: KvPublication) -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets, other_columns={1: range(3, 5), 2: range(1)})
    with pytest.raises(ProtocolError):
        tickets.take(ticket, bad, now_s=5.0)
    assert (ticket.next_block, ticket.progress_s, tickets.num_reads) == (0, 0.0, 0)
    tickets.take(ticket, publication(3, 2, group=1), now_s=0.0)
    with pytest.raises(ProtocolError, match="0:0 expected"):
        tickets.take(ticket, publication(3, 2, group=1), now_s=0.0)


def test_what_is_expected_is_counted_in_blocks_of_the_engine_that_publishes() -> None:
    tickets = DecodeTickets[str](1)
    ticket = open_ticket(tickets, num_tokens=70, num_held=5)
    accept(tickets, ticket, block_size=16, other_columns={1: range(4, 5)})
    with pytest.raises(ProtocolError, match="1:5 expected"):
        tickets.take(ticket, publication(2, 3), now_s=0.0)
    read_id = take(tickets, ticket, publication(1, 4), now_s=0.0)
    tickets.take(ticket, publication(4, 1, group=1, first_token=FIRST_TOKEN), now_s=0.0)
    tickets.finish_read(ReadFinished(read_id=read_id), now_s=0.0)
    assert ticket.is_complete


def test_a_last_publication_without_blocks_needs_no_read() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    read_id = take(tickets, ticket, publication(0, 5), now_s=0.0)
    tickets.take(ticket, publication(5, 0, first_token=FIRST_TOKEN), now_s=0.0)
    tickets.finish_read(ReadFinished(read_id=read_id), now_s=0.0)
    assert ticket.is_complete


@pytest.mark.parametrize(
    "bad",
    [
        publication(1, 2),
        publication(0, 6),
        publication(0, 2, epoch=8),
        publication(0, 4, first_token=FIRST_TOKEN),
    ],
    ids=["a hole", "too many blocks", "another epoch", "first token before the last block"],
)
def test_a_publication_that_cannot_be_right_is_refused_and_changes_nothing(bad: KvPublication) -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    with pytest.raises(ProtocolError):
        tickets.take(ticket, bad, now_s=5.0)
    assert (ticket.next_block, ticket.progress_s, tickets.num_reads, ticket.has_first_token) == (0, 0.0, 0, False)


def test_nothing_is_published_before_the_order_was_accepted() -> None:
    tickets = DecodeTickets[str](1)
    with pytest.raises(ProtocolError, match="published under epoch"):
        tickets.take(open_ticket(tickets), publication(0, 2), now_s=0.0)


def test_nothing_is_published_after_the_first_token() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    tickets.take(ticket, publication(0, 5, first_token=FIRST_TOKEN), now_s=0.0)
    with pytest.raises(ProtocolError, match="expected"):
        tickets.take(ticket, publication(5, 0, first_token=FIRST_TOKEN), now_s=0.0)


def test_an_order_is_accepted_once() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    with pytest.raises(ProtocolError, match="accepted twice"):
        accept(tickets, ticket)


def test_blocks_are_not_given_back_while_a_read_writes_them() -> None:
    tickets = DecodeTickets[str](1)
    ticket = receiving(tickets)
    read_id = take(tickets, ticket, publication(0, 2), now_s=0.0)
    assert not tickets.drain(ticket, wants_fallback=True)
    assert ticket.state is DecodeState.DRAINING
    with pytest.raises(AssertionError, match="reads under way"):
        tickets.close(ticket)
    tickets.finish_read(ReadFinished(read_id=read_id, error="gone"), now_s=0.0)
    assert tickets.drain(ticket, wants_fallback=True)
    tickets.close(ticket)


def test_a_client_that_leaves_while_a_ticket_drains_ends_the_fallback_and_not_the_other_way_round() -> None:
    tickets = DecodeTickets[str](1)
    failed, cancelled = open_ticket(tickets), open_ticket(tickets)
    tickets.drain(failed, wants_fallback=True)
    tickets.drain(failed, wants_fallback=False)
    tickets.drain(cancelled, wants_fallback=False)
    tickets.drain(cancelled, wants_fallback=True)
    assert not failed.wants_fallback
    assert not cancelled.wants_fallback


def test_a_ticket_stalls_when_nothing_has_happened_for_too_long() -> None:
    tickets = DecodeTickets[str](1)
    ticket = open_ticket(tickets)
    assert tickets.stalled(2.9) == []
    assert tickets.stalled(3.0) == [ticket]
    accept(tickets, ticket, now_s=3.0)
    read_id = take(tickets, ticket, publication(0, 2), now_s=5.0)
    tickets.finish_read(ReadFinished(read_id=read_id), now_s=7.0)
    assert tickets.stalled(9.9) == []
    assert tickets.stalled(10.0) == [ticket]


def test_a_draining_ticket_is_deaf_silent_and_not_renewed() -> None:
    tickets = DecodeTickets[str](1)
    ticket = open_ticket(tickets)
    assert tickets.get(ticket.ticket_id, peer_id="p") is ticket
    assert tickets.wanted() == {address(): (ticket.ticket_id,)}
    tickets.drain(ticket, wants_fallback=True)
    assert tickets.get(ticket.ticket_id, peer_id="p") is None
    assert tickets.wanted() == {}
    assert tickets.of_peer("p") == tickets.stalled(100.0) == []
    assert tickets.of_request("request") == [ticket]


def test_only_the_engine_that_was_asked_speaks_for_a_ticket() -> None:
    tickets = DecodeTickets[str](1)
    ticket = open_ticket(tickets)
    assert tickets.get(ticket.ticket_id, peer_id="other") is None
    assert tickets.get("unknown", peer_id="p") is None


def test_the_end_of_an_unknown_read_is_ignored() -> None:
    assert DecodeTickets[str](1).finish_read(ReadFinished(read_id=5), now_s=0.0) is None
