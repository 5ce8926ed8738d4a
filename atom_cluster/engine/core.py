"""Stop 7 of 14 begins here: the step loop of one engine. Next: atom_cluster/engine/scheduler.py.

A turn of the loop takes in what arrived, fills the next step, hands it to the runner, and applies the result of an
earlier one. With asynchronous scheduling two plans are in flight: the runner always has the next one when it finishes
one, and the tokens that a result brings were counted, without being known, when the step after it was planned. Tokens
go out in one message per client and turn, first tokens from prefill before that. Knows nothing of tensors, HTTP or Ray.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import msgspec

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.admission import make_request
from atom_cluster.engine.decode_side import DecodeSide
from atom_cluster.engine.draining import Draining, draining
from atom_cluster.engine.grammar_desk import GrammarDesk
from atom_cluster.engine.inbox import DrainWanted, Inbox, Item, Lost, SnapshotWanted
from atom_cluster.engine.open_requests import OpenRequests
from atom_cluster.engine.prefill_side import PrefillSide
from atom_cluster.engine.profiling import ProfileDesk
from atom_cluster.engine.protocols import EngineInput, Outbox, StepRunner
from atom_cluster.engine.replies import Replies
from atom_cluster.engine.reporting import CacheReporter, count_prefix, queue_details, take_status
from atom_cluster.engine.request import Request
from atom_cluster.engine.results import (
    NewTokens,
    append_tokens,
    cannot_structure,
    confirm_row,
    end_before_first,
    failure_of,
    note_scores,
)
from atom_cluster.engine.scheduler import ScheduledRow, Scheduler
from atom_cluster.engine.speculation import DraftStatistics
from atom_cluster.engine.speed import SpeedMeter
from atom_cluster.engine.step_meter import StepMeter
from atom_cluster.engine.step_pipeline import StepPipeline
from atom_cluster.errors import AtomClusterError, EngineLost, InvalidRequest, Overloaded
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.kv_cache.prefix_hash import fingerprint_of, seed_of
from atom_cluster.messages.cluster import EngineStatus, PeerAddress
from atom_cluster.messages.grammars import GrammarReady
from atom_cluster.messages.profile import StartProfile, StopProfile, WindowWritten
from atom_cluster.messages.requests import CancelRequest, EngineRequest, TokenDelta
from atom_cluster.messages.steps import SampledTokens
from atom_cluster.messages.transfer import (
    BlocksTagged,
    KvCommand,
    KvExport,
    KvPlacement,
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    Report,
    TicketRelease,
    TicketRenew,
)
from atom_cluster.observability.metrics import PROMPT_TOKENS, MetricSink

_KV_POLL_S = 0.0002
"""How often an otherwise idle engine looks for the end of KV reads, checksums and compilations of grammars."""
_STEP_LOOK_S = 0.01
"""How often an engine that waits for a step looks for messages and at the clock."""
_HANDOFF_LOOK_S = 0.001
"""The same where there may be prompts to pass on to prefill, and first tokens to hand out."""
_BLOCKED_WAIT_S = 0.01
"""Longest sleep of an engine whose requests all wait for something."""
_IDLE_WAIT_S = 0.1
"""Longest sleep of an idle engine; leases, deadlines and reports are looked at this often."""


class EngineCore:
    """One engine. What stands under "from any thread" may be called from any, everything else from one."""

    def __init__(
        self,
        *,
        runner: StepRunner,
        outbox: Outbox,
        scheduler: SchedulerConfig,
        transfer: KvTransferConfig,
        metrics: MetricSink,
        peer: PeerAddress,
        prefix_caching: bool = True,
        load_period_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`peer` is the engine's own address; its epoch becomes the epoch of exported blocks. The runner stays the
        caller's to close."""
        info = runner.info
        self._runner = runner
        self._info = info
        self._metrics = metrics
        self._clock = clock
        self.fingerprint = fingerprint_of(info.fingerprint_fields)
        self._blocks = BlockManager(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            seed=seed_of(self.fingerprint),
            prefix_caching=prefix_caching,
            other_groups=info.other_groups,
            max_drafts=info.max_drafts,
        )
        self._scheduler = Scheduler(
            config=scheduler,
            blocks=self._blocks,
            num_rows=info.max_num_requests,
            metrics=metrics,
            clock=clock,
            max_drafts=info.max_drafts,
        )
        self._speed = SpeedMeter(scheduler, block_size=info.block_size, clock=clock)
        self._pipeline = StepPipeline(
            runner, depth=2 if scheduler.async_scheduling else 1, meter=StepMeter(metrics, clock)
        )
        self.drafts = DraftStatistics(metrics)
        self._replies = Replies(outbox, metrics, clock)
        self._reporter = CacheReporter(
            pool=self._blocks.pool, outbox=outbox, metrics=metrics, peer=peer, period_s=load_period_s, clock=clock
        )
        export = KvExport(
            epoch=peer.epoch,
            fingerprint=self.fingerprint,
            fingerprint_fields=info.fingerprint_fields,
            placement=KvPlacement(block_size=info.block_size, world_size=info.world_size),
            offers=info.kv_offers,
        )
        self._kv_commands: list[KvCommand] = []
        self._prefill = PrefillSide(
            export=export,
            scheduler=self._scheduler,
            blocks=self._blocks,
            outbox=outbox,
            command=self._kv_commands.append,
            metrics=metrics,
            clock=clock,
        )
        self._decode = DecodeSide(
            export=export,
            transports=info.kv_transports,
            config=transfer,
            scheduler=self._scheduler,
            blocks=self._blocks,
            outbox=outbox,
            command=self._kv_commands.append,
            emit_first=self._emit_remote,
            note_handoff=self._speed.note_handoff,
            errors=self._replies.errors,
            metrics=metrics,
            clock=clock,
        )
        self._open = OpenRequests(
            scheduler=self._scheduler, blocks=self._blocks, replies=self._replies, cancel_remote=self._decode.cancel
        )
        self._grammars = GrammarDesk(num_rows=self._scheduler.num_rows, metrics=metrics, clock=clock)
        self._draining = Draining()
        self._profile = ProfileDesk(refusal=info.profile_refusal, replica=peer.peer_id, outbox=outbox)
        self._inbox = Inbox(clock)
        self._orders = itertools.count()
        self._is_busy = False
        self._is_stopping = False
        self._stats = self._take_stats()

    # --- from any thread

    def put(self, source: str, message: EngineInput) -> None:
        """Queue a message from whoever is known by `source`."""
        self._inbox.put(source, message)

    def drop_peer(self, peer_id: str) -> None:
        """A process is gone: the requests it sent end, the tickets it is part of end."""
        self._inbox.put(peer_id, Lost(peer_id))

    def request_snapshot(self) -> None:
        """Send the router all of the cache's hashes, and load and events from then on."""
        self._inbox.put("", SnapshotWanted())

    def begin_drain(self, timeout_s: float) -> None:
        """Take no more requests; finish those there are, and move what is left after so long; see `draining`."""
        self._inbox.put("", DrainWanted(timeout_s))

    def stats(self) -> EngineStatus:
        """The engine as of its last turn; messages that it has not seen yet count as waiting."""
        stats = self._stats
        return msgspec.structs.replace(stats, num_waiting=stats.num_waiting + len(self._inbox))

    def stop(self) -> None:
        """Make `run` return after its turn."""
        self._is_stopping = True

    # --- the loop

    def run(self) -> None:
        """Turn until `stop`. Raises what the runner raised, after every request was told."""
        while not self._is_stopping:
            self.step(wait_s=_IDLE_WAIT_S)

    def step(self, *, wait_s: float = 0.0) -> bool:
        """One turn; whether there is anything left to do. Sleeps up to `wait_s` for a message if there is not."""
        items = self._inbox.drain(self._patience(wait_s))
        try:
            self._is_busy = self._turn(items)
        except Exception as exc:
            self._fail_everything(EngineLost(f"the engine failed: {exc}"))
            raise
        self._replies.flush()
        self._stats = self._take_stats()
        return self._has_work()

    def _turn(self, items: list[Item]) -> bool:
        """Take in, plan, collect; whether anything happened that the next turn may build upon."""
        self._take_in(items)
        self._tick()
        reports = self._runner.poll_kv()
        for report in reports:
            self._handle_report(report)
        self._decode.start_queued()
        is_planned = self._plan()
        self._report()
        is_result_due = not self._pipeline.is_empty and (self._pipeline.is_full or not is_planned)
        if is_result_due:
            self._replies.flush()  # a first token from prefill is not to wait for this engine's step
            self._collect()
        return bool(items or reports or is_planned or is_result_due)

    def _report(self) -> None:
        # Before the result is waited for, which may take long: what comes meanwhile would be missing in a report that
        # the router believes to include it.
        self._stats = self._take_stats()
        self._reporter.report(
            self._stats,
            self._scheduler.count_waiting_tokens,
            lambda: self._speed.speed(has_decoding=self._scheduler.is_decoding),
            lambda: queue_details(self._scheduler, self._prefill, self._decode),
        )

    def _patience(self, wait_s: float) -> float:
        if self._is_busy or not self._pipeline.is_empty:
            return 0.0
        if self._awaits_kv() or self._grammars.is_waiting:
            return min(wait_s, _KV_POLL_S)
        if self._profile.is_waiting:
            return min(wait_s, _BLOCKED_WAIT_S)
        # What waits here waits for blocks, which come back with a message or a clock.
        return min(wait_s, _BLOCKED_WAIT_S) if self._has_work() else wait_s

    def _has_work(self) -> bool:
        has_tickets = len(self._prefill.tickets) + len(self._decode.tickets)
        return bool(not self._pipeline.is_empty or len(self._open) or self._has_commands or has_tickets)

    @property
    def _has_commands(self) -> bool:
        """Whether ranks are to be told something besides what to compute."""
        return bool(self._kv_commands) or self._profile.has_command or self._grammars.has_commands

    def _plan(self) -> bool:
        step = self._scheduler.schedule(prompt_limit=self._speed.prompt_limit())
        if step.starved is not None:
            self._prefill.give_up(
                step.starved, Overloaded("prompts of other engines hold all pages", retry_after_s=1.0)
            )
        for request in step.unprepared:
            self._grammars.begin(request)
        if not (step.rows or step.freed_rows or self._has_commands):
            return False
        self._pipeline.submit(
            step,
            kv=tuple(self._kv_commands),
            profile=self._profile.take_command(),
            grammars=self._grammars.take_commands(),
        )
        self._kv_commands.clear()
        return True

    def _collect(self) -> None:
        while (step := self._pipeline.collect(self._step_patience_s())) is None:
            # A step may take seconds: longer than a lease, and much longer than the checksums that a first token waits
            # for. Who wants no more of a request, and what begins elsewhere, does not wait for it. Blocks that come
            # back meanwhile are given only to later plans, which run behind those in flight.
            for report in self._runner.poll_kv():
                self._handle_report(report)
            self._take_in(self._inbox.drain(0.0))
            self._tick()
            self._decode.start_queued()
            self._replies.flush()
        note_scores(step.rows, step.steps, step.result.prompt_scores)
        if step.rows and not step.result.compiled:
            self._scheduler.note_step_time(sum(row.num_prompt_tokens for row in step.rows), step.result.run_s)
            self._speed.note_step(step.rows, step.result.run_s)
        sampled = iter(step.result.sampled)
        for row in step.rows:
            self._apply(row, next(sampled) if row.samples else None)

    def _step_patience_s(self) -> float:
        if self._awaits_kv():
            return _KV_POLL_S
        return _HANDOFF_LOOK_S if self._decode.has_prefill else _STEP_LOOK_S

    def _awaits_kv(self) -> bool:
        """Whether checksums or reads are under way."""
        return bool(self._decode.tickets.num_reads) or any(t.unpublished for t in self._prefill.tickets.all())

    def _apply(self, row: ScheduledRow, sampled: SampledTokens | None) -> None:
        request = row.request
        request.num_in_flight -= 1
        request.marks.num_steps += 1
        if sampled is not None:
            request.num_sampling -= 1
            if row.num_drafts:
                self.drafts.note(row.num_drafts, len(sampled.token_ids) - 1)
        if request.is_done:
            return  # ended while the plan was in flight; what it sampled is nobody's
        if (failure := failure_of(sampled)) is not None:
            return self._fail(request, failure)
        confirm_row(row, sampled)
        new = None if sampled is None else self._append(request, sampled)
        self._blocks.confirm(request.table, request.tokens, request.num_confirmed)
        if request.ticket_id is not None:
            if new is None:
                self._prefill.on_computed(request)
            else:
                self._prefill.on_first_token(request, new)
        elif new is not None:
            self._replies.tokens(request, new)
            if new.finish_reason is not None:
                self._open.finish(request)

    # --- tokens

    def _append(self, request: Request, tokens: SampledTokens | TokenDelta) -> NewTokens:
        return append_tokens(request, tokens.token_ids, tokens.logprobs, max_model_len=self._info.max_model_len)

    def _emit_remote(self, request: Request, delta: TokenDelta) -> None:
        """The first token, from prefill."""
        new = self._append(request, delta)
        request.num_cached = max(request.num_cached or 0, delta.num_cached_tokens)
        count_prefix(request, self._metrics)
        self._replies.tokens(request, new)
        if new.finish_reason is not None:
            self._open.finish(request)

    # --- messages

    def _take_in(self, items: list[Item]) -> None:
        for item in items:
            self._handle(*item)
        if items:
            # Who asks while a step runs must not find an engine without the requests it has just taken in.
            self._stats = self._take_stats()

    def _handle(self, source: str, message: EngineInput | Lost | SnapshotWanted | DrainWanted, came_s: float) -> None:
        if isinstance(message, EngineRequest):
            self._add_request(source, message, came_s)
        elif isinstance(message, CancelRequest):
            self._open.cancel(source, message.request_id)
        elif isinstance(message, PrefillOrder):
            self._add_order(source, message, came_s)
        elif isinstance(message, PrefillAccepted):
            self._decode.on_accepted(source, message)
        elif isinstance(message, KvPublication):
            self._decode.on_publication(source, message, arrived_s=came_s)
        elif isinstance(message, PrefillFailed):
            self._decode.on_failed(source, message)
        elif isinstance(message, TicketRenew):
            self._prefill.tickets.renew(message.ticket_ids, peer_id=source, now_s=self._clock())
        elif isinstance(message, TicketRelease):
            self._prefill.release(source, message.ticket_ids)
        elif isinstance(message, StartProfile):
            self._profile.start(source, message)
        elif isinstance(message, StopProfile):
            self._profile.stop(source, message)
        elif isinstance(message, Lost):
            self._drop(message.peer_id)
        elif isinstance(message, DrainWanted):
            self._drain(message.timeout_s)
        else:
            self._reporter.send_snapshot()

    def _handle_report(self, report: Report) -> None:
        if isinstance(report, BlocksTagged):
            self._prefill.on_tagged(report)
        elif isinstance(report, WindowWritten):
            self._profile.on_written(report)
        elif isinstance(report, GrammarReady):
            for request in self._grammars.on_ready(report):
                self._fail(request, cannot_structure(report.error or ""))
        else:
            self._decode.on_read(report)

    def _add_request(self, client: str, message: EngineRequest, came_s: float) -> None:
        try:
            request = self._admit(client, message, came_s)
        except AtomClusterError as exc:
            return self._replies.refuse(client, message.request_id, exc)
        if (reason := end_before_first(request, max_model_len=self._info.max_model_len)) is not None:
            return self._replies.end(request, reason)
        self._open.add(request, deadline_s=message.deadline_s)
        self._metrics.inc(PROMPT_TOKENS, request.num_prompt)
        self._grammars.open(request)
        if message.prefill is not None and self._decode.wants(request):
            self._decode.add(request, message.prefill)
        else:
            self._scheduler.add(request)

    def _admit(self, client: str, message: EngineRequest, came_s: float) -> Request:
        self._draining.refuse_new()
        if message.request_id in self._open:
            raise InvalidRequest(f"request id {message.request_id!r} is in use", param="request_id")
        self._scheduler.check_room(num_elsewhere=self._decode.num_queued)
        return make_request(message, client=client, info=self._info, order=next(self._orders), now_s=came_s)

    def _add_order(self, peer_id: str, order: PrefillOrder, came_s: float) -> None:
        try:
            self._draining.refuse_new()
            self._prefill.check(order)
            self._scheduler.check_room()
            request = make_request(order, client=peer_id, info=self._info, order=next(self._orders), now_s=came_s)
            self._prefill.open(order, peer_id=peer_id, request=request, now_s=self._clock())
        except AtomClusterError as exc:
            return self._prefill.refuse(order, peer_id=peer_id, error=exc)
        self._grammars.open(request)
        self._scheduler.add(request)

    # --- ends

    def _fail(self, request: Request, error: AtomClusterError) -> None:
        """A request cannot go on. Others are none the worse."""
        if request.ticket_id is not None:
            return self._prefill.give_up(request, error)
        self._open.fail(request, error)

    def _drop(self, peer_id: str) -> None:
        self._open.drop_client(peer_id)
        self._prefill.drop_peer(peer_id)
        self._decode.drop_peer(peer_id)
        self._replies.forget(peer_id)

    def _drain(self, timeout_s: float) -> None:
        # With drafts a step may yield several tokens.
        now_s, token_s = self._clock(), self._speed.decode_step_s / (1 + self._info.max_drafts)
        self._draining.begin(timeout_s, now_s=now_s)
        for request in self._open.all():
            if self._draining.leaves_at_once(request, token_s=token_s, now_s=now_s):
                self._open.move(request, draining())

    def _tick(self) -> None:
        now_s = self._clock()
        if self._draining.is_over(now_s):
            for request in self._open.all():
                self._open.move(request, draining())
            self._prefill.give_up_all(draining())
        self._prefill.expire(now_s)
        self._decode.tick(now_s)
        self._open.expire(now_s)

    def _fail_everything(self, error: AtomClusterError) -> None:
        """The runner is unusable: tell everybody, so that nobody waits for an engine that will not answer."""
        self._prefill.abandon(error)
        self._decode.abandon()
        self._profile.fail(str(error))
        self._open.tell_all(error)
        for source, message, _ in self._inbox.drain(0.0):
            if isinstance(message, EngineRequest):
                self._replies.refuse(source, message.request_id, error)
            elif isinstance(message, PrefillOrder):
                self._prefill.refuse(message, peer_id=source, error=error)
        self._replies.flush()

    def _take_stats(self) -> EngineStatus:
        return take_status(self._scheduler, self._blocks, self._prefill, self._decode, self._replies.errors)
