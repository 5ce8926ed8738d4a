"""Ranks without a model, made in the workers' own processes from `RunnerOptions`, and an engine host around them.

`model_dir` says how a rank behaves: `ok`, or `<what>:<rank>` with what = `fail_load`, `fail_step`, `hang_step`, or
`fail_device`: the step is issued, and fails a moment later.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass

from atom_cluster.engine.protocols import StepRunner
from atom_cluster.errors import AtomClusterError, ConfigError
from atom_cluster.messages.cluster import EngineStatus, MemberCard, PeerAddress
from atom_cluster.messages.profile import OpenWindow, WindowWritten
from atom_cluster.messages.steps import SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import BlocksTagged, RankReport, ReadBlocks, ReadFinished, Report, TagBlocks
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.structured.held import HeldGrammars


@dataclass
class FakeLaunched:
    result: StepResult
    fails_at_s: float = math.inf

    def is_done(self) -> bool:
        if time.monotonic() >= self.fails_at_s:
            raise AtomClusterError("the device is on fire")
        return self.fails_at_s == math.inf

    def wait(self) -> StepResult:
        return self.result


class FakeRank:
    """Samples 100 + row for each sampling row on rank 0; answers KV commands at the second poll. Has no vocabulary."""

    computes_alone = False

    def __init__(self, *, rank: int, world_size: int, behaviour: str = "ok") -> None:
        self.info = RankInfo(
            num_blocks=8,
            block_size=4,
            max_num_requests=4,
            max_model_len=64,
            vocab_size=256,
            rank=rank,
            world_size=world_size,
            kv_descriptors={"shm": f"rank {rank}".encode()},
        )
        self.grammars = HeldGrammars(None)
        self.plans: list[StepPlan] = []
        self.num_closed = 0
        self.is_stuck = threading.Event()
        self.release = threading.Event()
        self._what, _, self._where = behaviour.partition(":")
        self._reports: deque[RankReport] = deque()
        self._num_polls = 0

    def launch(self, plan: StepPlan) -> FakeLaunched:
        if self._where == str(self.info.rank):
            if self._what == "fail_step":
                raise AtomClusterError("the device is on fire")
            if self._what == "hang_step":
                self.is_stuck.set()
                self.release.wait()
        self.plans.append(plan)
        self.grammars.execute(plan.grammars)
        for command in plan.kv:
            if isinstance(command, TagBlocks):
                own = tuple(10 * self.info.rank + block for block in command.block_ids)
                tags = tuple(own if rank == self.info.rank else () for rank in range(command.reader.world_size))
                self._reports.append(self._report(BlocksTagged(ticket_id=command.ticket_id, first_block=0, tags=tags)))
            elif isinstance(command, ReadBlocks):
                self._reports.append(self._report(ReadFinished(read_id=command.read_id, num_bytes=5)))
        if isinstance(plan.profile, OpenWindow):
            files = (f"rank {self.info.rank}",)
            self._reports.append(self._report(WindowWritten(window_id=plan.profile.window_id, files=files)))
        sampled = tuple(SampledTokens(row.row, (100 + row.row,)) for row in plan.rows if row.samples)
        fails = self._where == str(self.info.rank) and self._what == "fail_device"
        return FakeLaunched(
            StepResult(step_id=plan.step_id, sampled=sampled if self.info.rank == 0 else ()),
            fails_at_s=time.monotonic() + 0.2 if fails else math.inf,
        )

    def poll_kv(self) -> list[RankReport]:
        self._num_polls += 1
        self._reports += [self._report(ready) for ready in self.grammars.poll()]
        return [self._reports.popleft()] if self._reports and self._num_polls % 2 == 0 else []

    def close(self) -> None:
        self.num_closed += 1

    def _report(self, report: Report) -> RankReport:
        return RankReport(rank=self.info.rank, report=report)


def build(options: RunnerOptions) -> FakeRank:
    what, _, where = options.model_dir.partition(":")
    if what == "fail_load" and where == str(options.rank):
        raise ConfigError(f"rank {options.rank} of {options.world_size} has no such model")
    return FakeRank(rank=options.rank, world_size=options.world_size, behaviour=options.model_dir)


class FakeHost:
    """An engine host whose engine runs empty steps in a thread, one after the other."""

    def __init__(self, *, runner: StepRunner, settings: str) -> None:
        self._runner = runner
        self._settings = settings
        self._failure: str | None = None
        self._num_steps = 0
        self._is_draining = False
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> MemberCard:
        info = self._runner.info
        self._thread.start()
        return MemberCard(
            address=PeerAddress(peer_id=self._settings, endpoint="tcp://127.0.0.1:1", epoch=1),
            kind="engine",
            num_blocks=info.num_blocks,
            choices={
                "offers": str(len(info.kv_offers[0].descriptors) if info.kv_offers else 0),
                "plan_channel": info.choices.get("plan_channel", "none"),
            },
        )

    def status(self) -> EngineStatus:
        return EngineStatus(num_running=self._num_steps, num_waiting=0, num_tickets=0, blocks_by_state={})

    def begin_drain(self, timeout_s: float) -> None:
        self._is_draining = True

    def is_idle(self) -> bool:
        return self._is_draining

    def failure(self) -> str | None:
        return self._failure

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join(10)
        self._runner.close()

    def _run(self) -> None:
        try:
            while not self._is_closed.wait(0.01):
                self._runner.submit(StepPlan(step_id=self._num_steps))
                while self._runner.collect(0.1) is None:
                    if self._is_closed.is_set():
                        return
                self._num_steps += 1
        except AtomClusterError as exc:
            self._failure = str(exc)
