"""An engine's use of others: prompts computed by a prefill engine, whose blocks are read into this one's.

Whatever goes wrong, the request is not lost: once its own reads are over it is computed here, from the start or from
the first bad block, with the first token kept if the client has it already.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence

from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.protocols import Outbox
from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.scheduler import Scheduler
from atom_cluster.errors import ProtocolError, TransferError
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.kv_cache.prefix_hash import differences
from atom_cluster.kv_transfer.handoff import DecodeState, DecodeTicket, DecodeTickets
from atom_cluster.kv_transfer.routes import check_placement
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import TokenDelta
from atom_cluster.messages.transfer import (
    ConnectPeer,
    DropPeer,
    KvCommand,
    KvExport,
    KvOffer,
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    ReadBlocks,
    ReadFinished,
    TicketRelease,
    TicketRenew,
)
from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.metrics import (
    KV_BAD_BLOCKS,
    KV_EXPOSED_S,
    KV_READS,
    KV_TRANSFER_BYTES,
    KV_TRANSFER_FAILURES,
    KV_TRANSFER_S,
    MetricSink,
)
from atom_cluster.observability.recent_errors import RecentErrors

Ticket = DecodeTicket[Request]

_logger = get_logger(__name__)

_RENEWALS_PER_LEASE = 3
"""Messages take their time."""


class DecodeSide:
    """Opens, follows and closes tickets of a decode engine. Called from the engine's thread."""

    def __init__(
        self,
        *,
        export: KvExport,
        transports: Sequence[str],
        config: KvTransferConfig,
        scheduler: Scheduler,
        blocks: BlockManager,
        outbox: Outbox,
        command: Callable[[KvCommand], None],
        emit_first: Callable[[Request, TokenDelta], None],
        note_handoff: Callable[[int, float], None],
        errors: RecentErrors,
        metrics: MetricSink,
        clock: Callable[[], float],
    ) -> None:
        """`transports` can be read through, best first. `emit_first` hands a request's first token to its client, and
        ends the request if that was all. `note_handoff` gets tokens read and seconds beyond those of computing."""
        self._export = export
        self._transports = tuple(transports)
        self._config = config
        self._scheduler = scheduler
        self._blocks = blocks
        self._outbox = outbox
        self._command = command
        self._emit_first = emit_first
        self._note_handoff = note_handoff
        self._errors = errors
        self._metrics = metrics
        self._clock = clock
        self._queue: list[tuple[Request, PeerAddress]] = []
        self._peers: set[str] = set()
        self._renewed_s = clock()
        self.tickets: DecodeTickets[Request] = DecodeTickets(export.epoch)
        self.num_mismatches = 0
        """Handoffs given up because prefill's blocks do not mean the same."""

    @property
    def num_queued(self) -> int:
        """Requests that wait for blocks before they are sent to prefill."""
        return len(self._queue)

    def wants(self, request: Request) -> bool:
        """Whether a request's prompt is worth sending to prefill. One that is to be scored is not: that takes the
        output head at each position, on the engine that answers, and its scores would be no part of what is read."""
        if not self._transports or request.wants_prompt_scores:
            return False
        return len(request.tokens) - self._blocks.count_matching(request.tokens) >= self._config.min_remote_tokens

    def add(self, request: Request, address: PeerAddress) -> None:
        """Queue a request for prefill."""
        request.phase = Phase.REMOTE
        bisect.insort(self._queue, (request, address), key=lambda entry: entry[0].rank)

    def start_queued(self) -> None:
        """Send what has room to prefill, in order."""
        while self._queue and self._start(*self._queue[0]):
            self._queue.pop(0)

    def _start(self, request: Request, address: PeerAddress) -> bool:
        # Of groups other than the first everything comes from prefill: it is little, and only of use in one piece.
        request.table = self._blocks.match(request.tokens, "arriving", in_first_group=True)
        num_held = len(request.table.block_ids) * self._blocks.block_size
        # Who waits for pages of this engine longer gets them first; else a stream of short prompts would starve it.
        wanted = self._scheduler.pages_wanted(request)
        missing = self._blocks.missing_to_receive(request.table, request.num_initial)
        is_room = self._blocks.has_room(missing, besides=wanted)
        if not is_room or not self._blocks.receive(request.table, request.num_initial):
            self._blocks.release(request.table)
            return False
        now_s = self._clock()
        request.scheduled_s = now_s
        request.marks.begin("remote_prefill", now_s)
        request.num_cached = num_held
        ticket = self.tickets.open(
            request,
            request_id=request.request_id,
            address=address,
            num_tokens=request.num_initial,
            num_tokens_held=num_held,
            timeout_s=self._config.prefill_timeout_s,
            now_s=now_s,
        )
        self._outbox.send(
            address,
            PrefillOrder(
                ticket_id=ticket.ticket_id,
                request_id=request.request_id,
                client_request_id=request.client_request_id,
                token_ids=tuple(request.tokens[: request.num_prompt]),
                sampling=request.sampling,
                eos_token_ids=tuple(sorted(request.eos)),
                emitted=tuple(request.tokens[request.num_prompt :]),
                num_tokens_held=num_held,
                lease_s=self._config.lease_s,
                fingerprint=self._export.fingerprint,
                fingerprint_fields=self._export.fingerprint_fields,
                placement=self._export.placement,
                wants_tags=self._config.verify_blocks,
                priority=request.priority,
            ),
        )
        return True

    # --- what prefill says

    def on_accepted(self, source: str, message: PrefillAccepted) -> None:
        """Prefill works on it; connect to its memory."""
        ticket = self.tickets.get(message.ticket_id, peer_id=source)
        if ticket is None:
            self._let_go(source, message.ticket_id)
            return
        export = message.export
        try:
            self._check(export)
        except TransferError as exc:
            self._fall_back(ticket, "mismatch", f"{source}: {exc}")
            return
        offers = self._common(export)
        if not offers:
            self._fall_back(ticket, "no_transport", f"{source} offers {[o.transport for o in export.offers]}")
            return
        peer = f"{source}/{export.epoch}"
        if ticket.state is DecodeState.ASKED and peer not in self._peers:
            self._peers.add(peer)
            self._command(
                ConnectPeer(
                    peer=peer,
                    transport=offers[0].transport,
                    descriptors=offers[0].descriptors,
                    others=offers[1:],
                    placement=export.placement,
                )
            )
        self._guarded(ticket, lambda: self._accept(ticket, peer, export))

    def _check(self, export: KvExport) -> None:
        """Raise `TransferError` if prefill's blocks would not mean the same here, which it should have found itself."""
        if export.fingerprint != self._export.fingerprint:
            self.num_mismatches += 1
            fields = differences(export.fingerprint_fields, self._export.fingerprint_fields)
            raise TransferError(f"prefill and decode differ in {fields}")
        check_placement(export.placement, self._export.placement)

    def _common(self, export: KvExport) -> tuple[KvOffer, ...]:
        """What both sides have, in this side's order of preference."""
        offers = {offer.transport: offer for offer in export.offers}
        return tuple(offers[name] for name in self._transports if name in offers)

    def _accept(self, ticket: Ticket, peer: str, export: KvExport) -> None:
        block_size = export.placement.block_size
        self.tickets.accept(
            ticket,
            peer=peer,
            epoch=export.epoch,
            block_size=block_size,
            other_columns=self._blocks.columns_behind(ticket.num_tokens, block_size),
            now_s=self._clock(),
        )

    def on_publication(self, source: str, message: KvPublication, *, arrived_s: float) -> None:
        """Blocks can be read; with the last of them comes the first token, which the client gets at once. The message
        came at `arrived_s`."""
        ticket = self.tickets.get(message.ticket_id, peer_id=source)
        if ticket is None:
            self._let_go(source, message.ticket_id)
            return
        self._guarded(ticket, lambda: self._take(ticket, message, arrived_s))

    def _let_go(self, source: str, ticket_id: str) -> None:
        """Prefill works on a ticket that is over here: the release was lost, or overtaken. Else it would go on until
        the lease ends."""
        self._outbox.send(source, TicketRelease((ticket_id,)))

    def _take(self, ticket: Ticket, message: KvPublication, arrived_s: float) -> None:
        if self._config.verify_blocks and message.block_ids and not message.tags:
            raise ProtocolError(f"ticket {ticket.ticket_id}: blocks came without the tags that were asked for")
        self.tickets.take(ticket, message, now_s=self._clock())
        self._start_read(ticket, message)
        if message.first_token is not None:
            ticket.request.drafts = message.drafts
            ticket.request.marks.split(message.spans, arrived_s=arrived_s, now_s=self._clock())
            self._emit_first(ticket.request, message.first_token)
        if ticket.request.is_done:
            self._end(ticket, wants_fallback=False)
        elif ticket.is_complete:
            self._join(ticket)

    def _start_read(self, ticket: Ticket, message: KvPublication) -> None:
        """Read what was published into this engine's blocks of the same tokens, as far as they were not here before."""
        published = range(message.first_block, message.first_block + len(message.block_ids))
        columns = self._blocks.columns_with(message.group, published, ticket.block_size, num_tokens=ticket.num_tokens)
        if message.group == 0:
            num_held = ticket.num_tokens_held // self._blocks.block_size
            columns = range(max(columns.start, num_held), columns.stop)
        if not columns or not published:
            return
        self._command(
            ReadBlocks(
                read_id=self.tickets.start_read(ticket, group=message.group, first_column=columns.start),
                peer=ticket.peer,
                epoch=message.epoch,
                remote_block_ids=message.block_ids,
                local_block_ids=self._blocks.handed_over(ticket.request.table, message.group, columns),
                tags=message.tags,
                timeout_s=self._config.read_timeout_s,
                first_remote_block=message.first_block,
                first_local_block=columns.start,
                group=message.group,
            )
        )

    def on_failed(self, source: str, message: PrefillFailed) -> None:
        """Prefill gave up."""
        ticket = self.tickets.get(message.ticket_id, peer_id=source)
        if ticket is not None:
            self._fall_back(ticket, "prefill_failed", f"{message.kind}: {message.message}")

    def on_read(self, report: ReadFinished) -> None:
        """A read is over."""
        self._count_read(report)
        ticket = self.tickets.finish_read(report, now_s=self._clock())
        if ticket is None:
            return
        ticket.request.marks.note_read(report.seconds, report.num_bytes)
        if ticket.state is DecodeState.DRAINING:
            if not ticket.reads:
                self._settle(ticket)
        elif report.error is not None:
            self._fall_back(ticket, "read_failed", report.error)
        elif ticket.is_complete:
            self._join(ticket)

    def _count_read(self, report: ReadFinished) -> None:
        transport = report.transport
        outcome = "failed" if report.error is not None else "damaged" if report.bad_blocks else "ok"
        self._metrics.inc(KV_READS, transport=transport, outcome=outcome)
        self._metrics.inc(KV_TRANSFER_BYTES, report.num_bytes, transport=transport)
        if report.error is None:
            self._metrics.observe(KV_TRANSFER_S, report.seconds, transport=transport)

    # --- ends

    def _join(self, ticket: Ticket) -> None:
        """All pages are here: the request runs, and computes the bad blocks again."""
        request = ticket.request
        now_s = self._clock()
        if ticket.published_s is not None:
            self._metrics.observe(KV_EXPOSED_S, now_s - ticket.published_s)
        self._note_handoff(ticket.num_tokens - ticket.num_tokens_held, now_s - ticket.opened_s - ticket.computed_in_s)
        self.tickets.close(ticket)
        self._outbox.send(ticket.address, TicketRelease((ticket.ticket_id,)))
        good = deque([range(request.num_initial)])
        if ticket.bad_pages:
            bad_pages = sorted(set(ticket.bad_pages))
            self._metrics.inc(KV_BAD_BLOCKS, len(bad_pages))
            _logger.bind(**request.log_fields).warning("pages %s arrived damaged", bad_pages)
            request.drafts = ()
            good = self._between([column for _, column in bad_pages], request.num_initial)
            if self._blocks.has_other_groups:
                good = deque([range(0)])  # what is here of the others is of use only behind the prompt's end
                self._blocks.release(request.table)
        num_good = request.num_computed = request.num_confirmed = good.popleft().stop
        request.in_place = good
        self._blocks.rename(request.table, "running")
        self._blocks.confirm(request.table, request.tokens, num_good)
        self._scheduler.add(request)

    def _between(self, bad_columns: Sequence[int], num_tokens: int) -> deque[range]:
        """Tokens of the blocks between the bad ones. The first range, which may be empty, begins with the prompt."""
        good, start = deque[range](), 0
        for column in bad_columns:
            good.append(range(start, column * self._blocks.block_size))
            start = (column + 1) * self._blocks.block_size
        if start < num_tokens:
            good.append(range(start, num_tokens))
        return deque(tokens for index, tokens in enumerate(good) if tokens or not index)

    def _fall_back(self, ticket: Ticket, reason: str, why: str) -> None:
        """Compute the prompt here instead."""
        self._metrics.inc(KV_TRANSFER_FAILURES, reason=reason)
        self._errors.note(TransferError.__name__, f"prefilled here, {reason}: {why}")
        _logger.bind(**ticket.request.log_fields).warning("the prompt is computed here, %s: %s", reason, why)
        self._end(ticket, wants_fallback=True)

    def _end(self, ticket: Ticket, *, wants_fallback: bool) -> None:
        is_first_end = ticket.state is not DecodeState.DRAINING
        can_settle = self.tickets.drain(ticket, wants_fallback=wants_fallback)
        if is_first_end:
            self._outbox.send(ticket.address, TicketRelease((ticket.ticket_id,)))
        if can_settle:
            self._settle(ticket)

    def _settle(self, ticket: Ticket) -> None:
        """A draining ticket's reads are over: its blocks are nobody's."""
        self.tickets.close(ticket)
        self._blocks.release(ticket.request.table)
        ticket.request.drafts = ()
        if ticket.wants_fallback:
            if not ticket.request.num_new:
                ticket.request.num_cached = None  # what counts is found when it is scheduled here
            self._scheduler.add(ticket.request)

    def _guarded(self, ticket: Ticket, action: Callable[[], None]) -> None:
        try:
            action()
        except ProtocolError as exc:
            self._fall_back(ticket, "protocol", str(exc))

    def cancel(self, request: Request) -> None:
        """A request in `Phase.REMOTE` is over."""
        request.end()
        self._queue = [entry for entry in self._queue if entry[0] is not request]
        for ticket in self.tickets.of_request(request):
            self._end(ticket, wants_fallback=False)

    def drop_peer(self, peer_id: str) -> None:
        """A prefill engine is gone: its requests are computed here, and nothing is read from it any more."""
        for entry in [entry for entry in self._queue if entry[1].peer_id == peer_id]:
            self._queue.remove(entry)
            self._metrics.inc(KV_TRANSFER_FAILURES, reason="peer_lost")
            self._scheduler.add(entry[0])
        for ticket in self.tickets.of_peer(peer_id):
            self._fall_back(ticket, "peer_lost", peer_id)
        for peer in [peer for peer in self._peers if peer.rpartition("/")[0] == peer_id]:
            self._peers.remove(peer)
            self._command(DropPeer(peer=peer))

    def abandon(self) -> None:
        """This engine is about to end: prefill need not wait for leases to run out."""
        for address, ticket_ids in self.tickets.wanted().items():
            self._outbox.send(address, TicketRelease(ticket_ids))

    def tick(self, now_s: float) -> None:
        """Give up on tickets that stall; renew the others."""
        for ticket in self.tickets.stalled(now_s):
            self._fall_back(ticket, "timeout", f"no progress for {ticket.timeout_s} s")
        self._renew(now_s)

    @property
    def has_prefill(self) -> bool:
        """Whether there is a prefill engine to hear from."""
        return bool(self._peers or len(self.tickets))

    def _renew(self, now_s: float) -> None:
        if now_s - self._renewed_s >= self._config.lease_s / _RENEWALS_PER_LEASE:
            self._renewed_s = now_s
            for address, ticket_ids in self.tickets.wanted().items():
                self._outbox.send(address, TicketRenew(ticket_ids))
