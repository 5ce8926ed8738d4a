"""Worker: one rank of a gang, a Ray actor in a process of its own. Rank 0's also hosts the engine.

Life: `reserve` -> `load` -> rank 0 `listen`, the others `follow`, then rank 0 `serve` -> `stop`. The gang's head calls
them in this order (`gang.py`) and may `ping` at any time: methods run in a pool of threads. A follower ends its own
process when rank 0 is gone, however deep in a step it is. Knows no scheduling of actors and no requests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import ray

from atom_cluster.engine.protocols import StepRunner
from atom_cluster.errors import GangError
from atom_cluster.gang import wire
from atom_cluster.gang.engine_host import EngineHost, resolve
from atom_cluster.gang.follower import EXIT_LEADERLESS, LEAVE_S, Follower
from atom_cluster.gang.join import ChannelAddresses, connect, listen
from atom_cluster.gang.plan_channel import PlanReceiver, PlanSender
from atom_cluster.gang.rank_runner import RankRunner
from atom_cluster.gang.spec import ModelRanks, SimulatedRank
from atom_cluster.gang.step_clock import ClockedRunner, StepClock
from atom_cluster.messages.cluster import EngineStatus, MemberCard
from atom_cluster.observability.logging import LogFormat, setup_logging
from atom_cluster.runner.rank_info import RankInfo

_log = logging.getLogger(__name__)

Phase = Literal["new", "loading", "loaded", "working", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Where a worker came up, and a port that was free there."""

    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker's answer to a ping."""

    rank: int
    pid: int
    phase: Phase
    step_id: int
    """The step under way or the last one; -1 before the first."""
    busy_s: float
    """Seconds in the step under way; 0 when there is none."""
    failure: str | None
    engine: EngineStatus | None
    """Of the engine that this rank hosts, unless it failed."""


class Worker:
    """See the module docstring. Owns the rank's runner, its end of the channel and, on rank 0, the engine host."""

    def __init__(self, rank: int, replica: str, log_level: str, log_format: LogFormat) -> None:
        setup_logging(log_level, log_format, replica=replica, rank=rank)
        self._rank = rank
        self._node = ""
        self._phase: Phase = "new"
        self._failure: str | None = None
        self._clock = StepClock()
        self._rank_runner: RankRunner | None = None
        self._step_runner: StepRunner | None = None
        self._sender: PlanSender | None = None
        self._choices: dict[str, str] = {}
        self._receiver: PlanReceiver | None = None
        self._host: EngineHost | None = None
        self._is_dismissed = threading.Event()
        self._loop: threading.Thread | None = None

    def reserve(self) -> Reservation:
        """Say where this worker is."""
        self._node = ray.get_runtime_context().get_node_id()
        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return Reservation(node=self._node, host=host, port=probe.getsockname()[1])

    def load(self, ranks: ModelRanks | SimulatedRank) -> RankInfo | None:
        """Build the runner, together with all other ranks. None for a simulated one."""
        self._phase = "loading"
        make = resolve(ranks.factory)
        info: RankInfo | None = None
        if isinstance(ranks, SimulatedRank):
            self._step_runner = cast("StepRunner", make(ranks.argument))
        else:
            self._rank_runner = cast("RankRunner", make(ranks.options))
            info = self._rank_runner.info
        self._phase = "loaded"
        return info

    # --- rank 0

    def listen(self, node_by_rank: Mapping[int, str], host: str, send_timeout_s: float) -> ChannelAddresses:
        """Open the channel to these followers."""
        self._sender, addresses = listen(
            node=self._node, host=host, node_by_rank=node_by_rank, send_timeout_s=send_timeout_s
        )
        self._choices["plan_channel"] = addresses.describe()
        return addresses

    def serve(
        self, infos: Sequence[RankInfo], host_factory: str, host_settings: object, accept_timeout_s: float
    ) -> MemberCard:
        """Wait for the followers, then start the engine. `infos` are those of all ranks, in order."""
        runner = ClockedRunner(self._make_step_runner(infos, accept_timeout_s), self._clock)
        self._host = cast("EngineHost", resolve(host_factory)(runner=runner, settings=host_settings))
        card = self._host.start()
        self._phase = "working"
        return card

    def begin_drain(self, timeout_s: float) -> None:
        """See `EngineHost`."""
        self._engine().begin_drain(timeout_s)

    def is_idle(self) -> bool:
        """See `EngineHost`."""
        return self._engine().is_idle()

    # --- other ranks

    def follow(self, addresses: ChannelAddresses, timeout_s: float) -> None:
        """Join rank 0 and execute its plans from now on."""
        if self._rank_runner is None:
            raise GangError(f"rank {self._rank} has not been loaded")
        self._receiver = connect(addresses, rank=self._rank, node=self._node, timeout_s=timeout_s)
        follower = Follower(self._rank_runner, self._receiver, self._clock)
        self._phase = "working"
        self._loop = threading.Thread(target=self._follow, args=(follower, self._receiver), name="gang-follower")
        self._loop.daemon = True
        self._loop.start()
        threading.Thread(target=self._watch, args=(self._receiver,), name="gang-watch", daemon=True).start()

    # --- all ranks

    def ping(self) -> WorkerStatus:
        """How this rank is doing."""
        failure, host = self._failure, self._host
        if host is not None and failure is None:
            failure = host.failure()
        is_serving = host is not None and self._phase == "working" and failure is None
        return WorkerStatus(
            rank=self._rank,
            pid=os.getpid(),
            phase=self._phase,
            step_id=self._clock.step_id,
            busy_s=self._clock.busy_s,
            failure=failure,
            engine=host.status() if host is not None and is_serving else None,
        )

    def stop(self, timeout_s: float) -> None:
        """Rank 0: end the engine, which dismisses the others. The others: wait for that. Idempotent."""
        if self._host is not None:
            self._host.close()
        elif self._loop is not None:
            self._loop.join(timeout_s)
        self._phase = "stopped"

    def _engine(self) -> EngineHost:
        if self._host is None:
            raise GangError(f"rank {self._rank} hosts no engine")
        return self._host

    def _make_step_runner(self, infos: Sequence[RankInfo], accept_timeout_s: float) -> StepRunner:
        if self._step_runner is not None:
            return self._step_runner
        if self._rank_runner is None:
            raise GangError("rank 0 has not been loaded")
        # These import torch, which the head's process, where this class is only named, does well without.
        from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
        from atom_cluster.gang.gang_runner import GangRunner
        from atom_cluster.runner.model_runner import ModelRunner

        local = LocalRunner(cast("ModelRunner", self._rank_runner))
        if self._sender is None:
            return local
        self._sender.accept(accept_timeout_s)
        info = merge_rank_infos(infos)
        return GangRunner(
            info=dataclasses.replace(info, choices={**info.choices, **self._choices}),
            local=local,
            poll_local_kv=self._rank_runner.poll_kv,
            sender=self._sender,
        )

    def _follow(self, follower: Follower, receiver: PlanReceiver) -> None:
        """Supervisor of the follower's thread: tells rank 0 and every ping why it ended."""
        try:
            follower.run()
        except Exception as exc:  # noqa: BLE001 - reported to rank 0 and by every ping; the gang ends
            _log.exception("rank %d stopped", self._rank)
            self._failure = f"{type(exc).__name__}: {exc}"
            self._phase = "failed"
            self._report_failure(receiver, self._failure)
            return
        self._is_dismissed.set()
        if self._rank_runner is not None:
            self._rank_runner.close()
        receiver.close()
        self._phase = "stopped"

    def _report_failure(self, receiver: PlanReceiver, message: str) -> None:
        try:
            receiver.report(wire.encode(wire.RankFailed(message)))
        except GangError:
            _log.warning("rank %d could not tell rank 0, which is gone", self._rank)

    def _watch(self, receiver: PlanReceiver) -> None:
        """End this process when rank 0 is gone: a step that waits for it may never return."""
        receiver.wait_until_gone()
        if self._is_dismissed.wait(LEAVE_S):
            return
        _log.critical("rank %d exits: rank 0 is gone", self._rank)
        logging.shutdown()
        os._exit(EXIT_LEADERLESS)
