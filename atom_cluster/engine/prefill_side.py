"""An engine's work for others: prompts computed under tickets, their blocks published as they become complete."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from atom_cluster.engine.protocols import Outbox
from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.results import NewTokens
from atom_cluster.engine.scheduler import Scheduler
from atom_cluster.errors import AtomClusterError, TransferError
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.kv_cache.prefix_hash import differences
from atom_cluster.kv_transfer.handoff import PrefillTicket, PrefillTickets
from atom_cluster.kv_transfer.routes import check_placement
from atom_cluster.messages.requests import TokenDelta
from atom_cluster.messages.transfer import (
    BlocksTagged,
    KvCommand,
    KvExport,
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    TagBlocks,
)
from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.metrics import KV_LEASE_EXPIRIES, KV_PUBLISH_S, MetricSink
from atom_cluster.units import ceil_div

Ticket = PrefillTicket[Request]

_logger = get_logger(__name__)


class PrefillSide:
    """Opens, feeds and closes tickets of a prefill engine. Called from the engine's thread."""

    def __init__(
        self,
        *,
        export: KvExport,
        scheduler: Scheduler,
        blocks: BlockManager,
        outbox: Outbox,
        command: Callable[[KvCommand], None],
        metrics: MetricSink,
        clock: Callable[[], float],
    ) -> None:
        """`command` puts a KV command into the next plan."""
        self._export = export
        self._scheduler = scheduler
        self._blocks = blocks
        self._outbox = outbox
        self._command = command
        self._metrics = metrics
        self._clock = clock
        self.tickets: PrefillTickets[Request] = PrefillTickets()
        self.num_mismatches = 0
        """Orders refused because decode's blocks do not mean the same."""

    def check(self, order: PrefillOrder) -> None:
        """Raise `TransferError` if this engine's blocks would not mean the same on the other side, or not be of use."""
        if not self._export.offers:
            raise TransferError("this engine exports no KV")
        if order.fingerprint != self._export.fingerprint:
            self.num_mismatches += 1
            fields = differences(self._export.fingerprint_fields, order.fingerprint_fields)
            raise TransferError(f"prefill and decode differ in {fields}")
        check_placement(order.placement, self._export.placement)

    def open(self, order: PrefillOrder, *, peer_id: str, request: Request, now_s: float) -> None:
        """Take an order whose request is about to be scheduled."""
        self.tickets.open(order, peer_id=peer_id, request=request, block_size=self._blocks.block_size, now_s=now_s)
        self._outbox.send(peer_id, PrefillAccepted(ticket_id=order.ticket_id, export=self._export))
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.bind(**request.log_fields).debug("%d tokens ordered by %s", request.num_initial, peer_id)

    def refuse(self, order: PrefillOrder, *, peer_id: str, error: AtomClusterError) -> None:
        """Decline an order."""
        self._outbox.send(peer_id, _failed(order.ticket_id, error))

    def on_computed(self, request: Request) -> None:
        """More of a prompt's KV is in place."""
        ticket = None if request.ticket_id is None else self.tickets.get(request.ticket_id)
        if ticket is not None:
            self._publish(ticket, self._next_blocks(ticket, request.num_confirmed // self._blocks.block_size))

    def on_first_token(self, request: Request, new: NewTokens) -> None:
        """The prompt is computed; its blocks are held for the ticket from now on."""
        ticket = None if request.ticket_id is None else self.tickets.get(request.ticket_id)
        if ticket is None:
            raise AssertionError(f"{request.request_id} was computed for a ticket that is not open")
        delta = TokenDelta(
            request_id=request.request_id,
            first_index=request.num_replayed,
            token_ids=new.token_ids,
            logprobs=new.logprobs,
            num_cached_tokens=request.num_cached or 0,
        )
        ticket.first_token, ticket.drafts, ticket.computed_s = delta, request.drafts, self._clock()
        request.marks.begin("publish", ticket.computed_s)
        self._scheduler.remove(request)
        self._blocks.trim(request.table)
        self._blocks.rename(request.table, "leased")
        ranges = self._next_blocks(ticket, ceil_div(request.num_initial, self._blocks.block_size))
        self._publish(ticket, ranges | self._blocks.columns_behind(request.num_initial))
        if not ticket.unpublished and not ticket.is_published:
            self._send(ticket, 0, ticket.next_block, (), ())

    def on_tagged(self, report: BlocksTagged) -> None:
        """Blocks have their checksums and can be published."""
        ticket = self.tickets.get(report.ticket_id)
        if ticket is not None:
            self._send_unpublished(ticket, report.group, report.first_block, report.tags)

    def close(self, ticket: Ticket) -> None:
        """Give back a closed ticket's blocks, and stop what still runs for it."""
        if ticket.request.phase is not Phase.DONE:
            self._scheduler.remove(ticket.request)
        self._blocks.release(ticket.request.table)

    def announce_failure(self, ticket: Ticket, error: AtomClusterError) -> None:
        """Tell decode that nothing more will come under a ticket."""
        self._outbox.send(ticket.peer_id, _failed(ticket.order.ticket_id, error))

    def give_up(self, request: Request, error: AtomClusterError) -> None:
        """A prompt that cannot be computed here after all."""
        ticket = None if request.ticket_id is None else self.tickets.get(request.ticket_id)
        if ticket is not None:
            self.tickets.close(ticket)
            self.close(ticket)
            self.announce_failure(ticket, error)

    def release(self, peer_id: str, ticket_ids: Sequence[str]) -> None:
        """Decode has read, or wants no more, what these tickets are about."""
        for ticket in self.tickets.release(ticket_ids, peer_id=peer_id):
            self.close(ticket)

    def drop_peer(self, peer_id: str) -> None:
        """A decode engine is gone."""
        for ticket in self.tickets.of_peer(peer_id):
            self.tickets.close(ticket)
            self.close(ticket)

    def abandon(self, error: AtomClusterError) -> None:
        """This engine is about to end."""
        for ticket in self.tickets.all():
            self.announce_failure(ticket, error)

    def give_up_all(self, error: AtomClusterError) -> None:
        """Compute nothing more for others. What is published stays for the moment that reading it takes."""
        for ticket in self.tickets.all():
            if not ticket.is_published:
                self.give_up(ticket.request, error)

    def expire(self, now_s: float) -> None:
        """End tickets that decode has not renewed."""
        for ticket in self.tickets.expired(now_s):
            self._metrics.inc(KV_LEASE_EXPIRIES)
            self.close(ticket)
            error = TransferError(f"the lease of {ticket.order.lease_s} s was not renewed")
            self.announce_failure(ticket, error)

    def _next_blocks(self, ticket: Ticket, end: int) -> dict[int, range]:
        """Blocks of the first group up to `end`, once."""
        blocks = range(ticket.next_block, max(ticket.next_block, end))
        ticket.next_block = blocks.stop
        return {0: blocks} if blocks else {}

    def _publish(self, ticket: Ticket, ranges: dict[int, range]) -> None:
        """Publish columns of cache groups; with checksums, if decode wants them, as soon as those are known."""
        for group, columns in ranges.items():
            page_ids = self._blocks.handed_over(ticket.request.table, group, columns)
            ticket.unpublished[group, columns.start] = page_ids
        for group, columns in ranges.items():
            if ticket.order.wants_tags:
                self._command(
                    TagBlocks(
                        ticket_id=ticket.order.ticket_id,
                        epoch=self._export.epoch,
                        first_block=columns.start,
                        block_ids=ticket.unpublished[group, columns.start],
                        reader=ticket.order.placement,
                        group=group,
                    )
                )
            else:
                self._send_unpublished(ticket, group, columns.start, ())

    def _send_unpublished(
        self, ticket: Ticket, group: int, first_block: int, tags: tuple[tuple[int, ...], ...]
    ) -> None:
        self._send(ticket, group, first_block, ticket.unpublished.pop((group, first_block)), tags)

    def _send(
        self,
        ticket: Ticket,
        group: int,
        first_block: int,
        block_ids: tuple[int, ...],
        tags: tuple[tuple[int, ...], ...],
    ) -> None:
        is_last = ticket.first_token is not None and not ticket.unpublished
        ticket.is_published = is_last
        publication = KvPublication(
            ticket_id=ticket.order.ticket_id,
            epoch=self._export.epoch,
            first_block=first_block,
            block_ids=block_ids,
            tags=tags,
            group=group,
        )
        if is_last:
            publication = msgspec.structs.replace(
                publication,
                first_token=ticket.first_token,
                drafts=ticket.drafts,
                spans=ticket.request.marks.timing(self._clock()).spans,
            )
            if ticket.computed_s is not None:
                self._metrics.observe(KV_PUBLISH_S, self._clock() - ticket.computed_s)
        self._outbox.send(ticket.peer_id, publication)


def _failed(ticket_id: str, error: AtomClusterError) -> PrefillFailed:
    return PrefillFailed(ticket_id=ticket_id, kind=type(error).__name__, message=str(error))
