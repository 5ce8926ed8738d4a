"""Stop 13 of 14, the engines' side: tickets, under which a prompt's KV goes from prefill to decode. Pure; no I/O.

`PrefillTickets` is the ledger of an engine that computes prompts for others, `DecodeTickets` of one that has them
computed. A ticket is a small state machine; every event of either side, its peer, its client or its clock ends in a
state from which its blocks come back:

    prefill   COMPUTING --first token--> PUBLISHED --release | lease over | peer lost--> (gone, blocks released)
              COMPUTING --release | lease over | peer lost | error--> (gone, work cancelled, blocks released)

    decode    ASKED --accepted--> RECEIVING --last block read--> (gone, request runs)
              ASKED | RECEIVING --failure | timeout | other epoch | peer lost--> DRAINING --own reads over--> fallback
              ASKED | RECEIVING --client leaves--> DRAINING --own reads over--> (gone, blocks released)

Blocks that a read may still write are never given back: that is what DRAINING waits for. Message formats and the order
of messages are in `messages/transfer.py`. Times are seconds of the engine's own monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import TokenDelta
from atom_cluster.messages.transfer import KvPublication, PrefillOrder, ReadFinished
from atom_cluster.units import ceil_div

R = TypeVar("R")
"""An engine's request; opaque here."""


@dataclass(slots=True, eq=False)
class PrefillTicket(Generic[R]):
    """A prompt being computed, or computed, for another engine."""

    order: PrefillOrder
    peer_id: str
    """The decode engine."""
    request: R
    expires_s: float
    unpublished: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """Pages about to be published, most of them being tagged: cache group and first column -> ids."""
    next_block: int = 0
    """First block of the prompt that is neither published nor about to be."""
    first_token: TokenDelta | None = None
    """Known once the prompt is computed; goes out with the last publication."""
    drafts: tuple[int, ...] = ()
    """Known and going out together with it."""
    computed_s: float | None = None
    """When the first token became known."""
    is_published: bool = False
    """The last publication is out; the blocks only wait to be read."""

    @property
    def state_name(self) -> str:
        """computing, publishing (the prompt is computed, not all of it published) or published."""
        if self.is_published:
            return "published"
        return "computing" if self.first_token is None else "publishing"


class PrefillTickets(Generic[R]):
    """Tickets of a prefill engine."""

    def __init__(self) -> None:
        self._tickets: dict[str, PrefillTicket[R]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, order: PrefillOrder, *, peer_id: str, request: R, block_size: int, now_s: float) -> PrefillTicket[R]:
        """A new ticket. Raises `ProtocolError` if the id is in use: an order must not be doubled."""
        if order.ticket_id in self._tickets:
            raise ProtocolError(f"ticket {order.ticket_id} is open already")
        first = order.num_tokens_held // block_size
        ticket = PrefillTicket(order, peer_id, request, now_s + order.lease_s, next_block=first)
        self._tickets[order.ticket_id] = ticket
        return ticket

    def get(self, ticket_id: str) -> PrefillTicket[R] | None:
        """An open ticket."""
        return self._tickets.get(ticket_id)

    def renew(self, ticket_ids: Iterable[str], *, peer_id: str, now_s: float) -> None:
        """Decode still wants these; unknown ones are ignored."""
        for ticket in self._of(peer_id, ticket_ids):
            ticket.expires_s = now_s + ticket.order.lease_s

    def release(self, ticket_ids: Iterable[str], *, peer_id: str) -> list[PrefillTicket[R]]:
        """Close tickets at decode's word. Each is returned once, for its blocks to be given back."""
        return [self.close(ticket) for ticket in self._of(peer_id, ticket_ids)]

    def expired(self, now_s: float) -> list[PrefillTicket[R]]:
        """Close tickets whose lease is over."""
        return [self.close(ticket) for ticket in list(self._tickets.values()) if ticket.expires_s <= now_s]

    def of_peer(self, peer_id: str) -> list[PrefillTicket[R]]:
        """Open tickets of a decode engine."""
        return [ticket for ticket in self._tickets.values() if ticket.peer_id == peer_id]

    def all(self) -> list[PrefillTicket[R]]:
        """All open tickets."""
        return list(self._tickets.values())

    def close(self, ticket: PrefillTicket[R]) -> PrefillTicket[R]:
        """Forget a ticket."""
        del self._tickets[ticket.order.ticket_id]
        return ticket

    def _of(self, peer_id: str, ticket_ids: Iterable[str]) -> list[PrefillTicket[R]]:
        found = (self._tickets.get(ticket_id) for ticket_id in dict.fromkeys(ticket_ids))
        # Only the engine that opened a ticket may speak for it.
        return [ticket for ticket in found if ticket is not None and ticket.peer_id == peer_id]


class DecodeState(Enum):
    """How far a ticket is on decode's side."""

    ASKED = "asked"
    RECEIVING = "receiving"
    DRAINING = "draining"


@dataclass(slots=True, eq=False)
class DecodeTicket(Generic[R]):
    """A prompt that another engine computes for this one."""

    ticket_id: str
    address: PeerAddress
    request: R
    num_tokens: int
    """Of the whole prompt."""
    num_tokens_held: int
    """Leading ones whose KV was here from the start."""
    timeout_s: float
    """Without any sign of progress for this long the ticket fails."""
    opened_s: float
    progress_s: float
    state: DecodeState = DecodeState.ASKED
    peer: str = ""
    """Name under which the ranks know the exporting engine, once accepted."""
    epoch: int | None = None
    block_size: int = 0
    """Of prefill, once accepted; columns of its blocks are meant below."""
    num_blocks: int = 0
    """Blocks of the whole prompt."""
    next_block: int = 0
    """First block not published yet; those before were held from the start or are being read."""
    awaited: dict[int, range] = field(default_factory=dict)
    """What is not published yet of the other cache groups: group -> columns."""
    reads: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Reads under way: read id -> cache group and first column of this engine's blocks."""
    bad_pages: list[tuple[int, int]] = field(default_factory=list)
    """Pages of this engine whose content was not what prefill published, as group and column."""
    has_first_token: bool = False
    published_s: float | None = None
    """When the last publication came."""
    computed_in_s: float = 0.0
    """What prefill took until it had the first token, once known."""
    wants_fallback: bool = False
    """While draining: the request is to be computed here afterwards. Else it is over."""

    @property
    def is_complete(self) -> bool:
        """Whether everything was published and read, well or badly."""
        return self.has_first_token and not self.reads


class DecodeTickets(Generic[R]):
    """Tickets of a decode engine."""

    def __init__(self, epoch: int) -> None:
        """`epoch` of this engine goes into ticket ids, so that a restarted engine's differ."""
        self._epoch = epoch
        self._tickets: dict[str, DecodeTicket[R]] = {}
        self._ticket_by_read: dict[int, DecodeTicket[R]] = {}
        self._num_opened = 0
        self._num_reads = 0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def num_reads(self) -> int:
        """Reads under way."""
        return len(self._ticket_by_read)

    def open(
        self,
        request: R,
        *,
        request_id: str,
        address: PeerAddress,
        num_tokens: int,
        num_tokens_held: int,
        timeout_s: float,
        now_s: float,
    ) -> DecodeTicket[R]:
        """A new ticket for a prompt of `num_tokens`, of which the first `num_tokens_held` are here."""
        self._num_opened += 1
        ticket = DecodeTicket(
            ticket_id=f"{self._epoch:x}/{request_id}/{self._num_opened}",
            address=address,
            request=request,
            num_tokens=num_tokens,
            num_tokens_held=num_tokens_held,
            timeout_s=timeout_s,
            opened_s=now_s,
            progress_s=now_s,
        )
        self._tickets[ticket.ticket_id] = ticket
        return ticket

    def all(self) -> list[DecodeTicket[R]]:
        """All open tickets."""
        return list(self._tickets.values())

    def get(self, ticket_id: str, *, peer_id: str) -> DecodeTicket[R] | None:
        """An open ticket that this peer may speak for and that is not over already."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.address.peer_id != peer_id or ticket.state is DecodeState.DRAINING:
            return None
        return ticket

    def accept(
        self,
        ticket: DecodeTicket[R],
        *,
        peer: str,
        epoch: int,
        block_size: int,
        other_columns: dict[int, range],
        now_s: float,
    ) -> None:
        """Prefill took the order and will export blocks of this size under this epoch.

        `other_columns`, in blocks of that size, are needed of the cache groups behind the first.
        """
        if ticket.state is not DecodeState.ASKED:
            raise ProtocolError(f"ticket {ticket.ticket_id} was accepted twice")
        ticket.state, ticket.peer, ticket.epoch, ticket.progress_s = DecodeState.RECEIVING, peer, epoch, now_s
        ticket.block_size = block_size
        ticket.num_blocks = ceil_div(ticket.num_tokens, block_size)
        ticket.next_block = ticket.num_tokens_held // block_size
        ticket.awaited = dict(other_columns)

    def take(self, ticket: DecodeTicket[R], publication: KvPublication, *, now_s: float) -> None:
        """Note a publication.

        Raises `ProtocolError` for one that does not continue where the last one ended, or of another epoch.
        """
        if ticket.state is not DecodeState.RECEIVING or publication.epoch != ticket.epoch:
            raise ProtocolError(f"ticket {ticket.ticket_id}: published under epoch {publication.epoch}")
        next_block, awaited = _follow(ticket, publication)
        if publication.first_token is not None and (next_block != ticket.num_blocks or awaited):
            raise ProtocolError(f"ticket {ticket.ticket_id}: the first token came before the last block")
        ticket.next_block, ticket.awaited, ticket.progress_s = next_block, awaited, now_s
        if publication.first_token is not None:
            ticket.has_first_token, ticket.published_s = True, now_s
            ticket.computed_in_s = sum(span.seconds for span in publication.spans if span.name != "publish")

    def start_read(self, ticket: DecodeTicket[R], *, group: int, first_column: int) -> int:
        """The id of a read, about to be started, into columns of this engine from the first one on."""
        self._num_reads += 1
        ticket.reads[self._num_reads] = (group, first_column)
        self._ticket_by_read[self._num_reads] = ticket
        return self._num_reads

    def finish_read(self, report: ReadFinished, *, now_s: float) -> DecodeTicket[R] | None:
        """Note the end of a read, and its bad blocks; the ticket it belongs to."""
        ticket = self._ticket_by_read.pop(report.read_id, None)
        if ticket is not None:
            group, first_block = ticket.reads.pop(report.read_id)
            ticket.bad_pages.extend((group, first_block + index) for index in report.bad_blocks)
            ticket.progress_s = now_s
        return ticket

    def drain(self, ticket: DecodeTicket[R], *, wants_fallback: bool) -> bool:
        """The ticket is over; whether its blocks can be given back at once, else when its reads are."""
        ticket.wants_fallback = wants_fallback and (ticket.state is not DecodeState.DRAINING or ticket.wants_fallback)
        ticket.state = DecodeState.DRAINING
        return not ticket.reads

    def close(self, ticket: DecodeTicket[R]) -> None:
        """Forget a ticket without reads."""
        if ticket.reads:
            raise AssertionError(f"ticket {ticket.ticket_id} has reads under way")
        del self._tickets[ticket.ticket_id]

    def stalled(self, now_s: float) -> list[DecodeTicket[R]]:
        """Tickets without progress for too long."""
        return [
            ticket
            for ticket in self._tickets.values()
            if ticket.state is not DecodeState.DRAINING and now_s - ticket.progress_s >= ticket.timeout_s
        ]

    def of_peer(self, peer_id: str) -> list[DecodeTicket[R]]:
        """Tickets that this prefill engine works on."""
        return [
            ticket
            for ticket in self._tickets.values()
            if ticket.address.peer_id == peer_id and ticket.state is not DecodeState.DRAINING
        ]

    def of_request(self, request: R) -> list[DecodeTicket[R]]:
        """The request's ticket, if it has one."""
        return [ticket for ticket in self._tickets.values() if ticket.request is request]

    def wanted(self) -> dict[PeerAddress, tuple[str, ...]]:
        """Tickets that prefill is to keep, by where."""
        by_address: dict[PeerAddress, list[str]] = {}
        for ticket in self._tickets.values():
            # Of a draining one nothing will be used; prefill has been told so.
            if ticket.state is not DecodeState.DRAINING:
                by_address.setdefault(ticket.address, []).append(ticket.ticket_id)
        return {address: tuple(ids) for address, ids in by_address.items()}


def _follow(ticket: DecodeTicket[R], publication: KvPublication) -> tuple[int, dict[int, range]]:
    """`next_block` and `awaited` after a publication, unless it is not what comes next."""
    published = range(publication.first_block, publication.first_block + len(publication.block_ids))
    if publication.group:
        expected = ticket.awaited.get(publication.group, range(0))
        is_right = len(published) > 0 and published == expected
        after = ticket.next_block, {i: group for i, group in ticket.awaited.items() if i != publication.group}
    else:
        expected = range(ticket.next_block, ticket.num_blocks)
        is_right = published.start == expected.start and published.stop <= expected.stop
        after = published.stop, ticket.awaited
    if not is_right or ticket.has_first_token:
        raise ProtocolError(
            f"ticket {ticket.ticket_id}: blocks {published.start}:{published.stop} of group {publication.group} "
            f"published, {expected.start}:{expected.stop} expected"
        )
    return after
