"""A prefill and a decode engine side by side in one process, which move real KV between them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
from atom_cluster.engine.protocols import EngineOutput, StepRunner
from atom_cluster.gang.gang_runner import GangRunner
from atom_cluster.gang.shm_sender import ShmPlanSender
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, TokenBatch
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.units import Deadline
from tests.equivalence.follower_process import run_follower
from tests.equivalence.generation import Request
from tests.processes import forking

Way = Literal["remote", "decode", "prefill"]
"""Prefill computes the prompt and decode the output, or either computes both."""
KINDS = ("llama", "deepseek_v3", "deepseek_v4", "qwen3_next", "gpt_oss")
"""Models of whatever KV is moved: heads, latents, entries of several tokens, states or windows beside heads."""
CLIENT = "client"
BLOCK_SIZE = 8


@dataclass(frozen=True)
class Side:
    """How one of the two engines lays out its KV."""

    num_blocks: int = 128
    block_size: int = BLOCK_SIZE
    num_ranks: int = 1


class Pair:
    """A prefill and a decode engine in this process, each with its own runner and KV memory."""

    def __init__(
        self,
        model_dir: Path,
        *,
        transport: str,
        prefill: Side = Side(),
        decode: Side = Side(),
        max_num_batched_tokens: int = 1024,
        max_model_len: int = 256,
        num_drafts: int = 0,
        decode_faults: FaultsConfig | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, str] = {}
        self.metrics = {name: MemoryMetrics() for name in ("prefill", "decode")}
        self.addresses = {name: PeerAddress(peer_id=name, endpoint="", epoch=7) for name in ("prefill", "decode")}
        self.runners: list[StepRunner] = []
        self.cores: dict[str, EngineCore] = {}
        for name, side in (("prefill", prefill), ("decode", decode)):
            options = RunnerOptions(
                model_dir=str(model_dir),
                dtype="float64",
                device=device,
                block_size=side.block_size,
                num_blocks=side.num_blocks,
                max_num_requests=16,
                max_model_len=max_model_len,
                num_drafts=num_drafts,
                num_threads=1,
                kv_transport=transport,
                faults=decode_faults if name == "decode" else None,
                secret=b"0123456789abcdef",
            )
            runner = _open_runner(options, side.num_ranks)
            self.runners.append(runner)
            self.cores[name] = EngineCore(
                runner=runner,
                outbox=_Wire(self, name),
                scheduler=SchedulerConfig(max_num_requests=16, max_num_batched_tokens=max_num_batched_tokens),
                transfer=KvTransferConfig(min_remote_tokens=4),
                metrics=self.metrics[name],
                peer=self.addresses[name],
            )

    def generate(
        self, requests: list[Request], *, ways: Sequence[Way] = ("remote",), timeout_s: float = 20.0
    ) -> list[list[int]]:
        """Output tokens, all requests sent at once, each in the next one of these ways."""
        for number, ((prompt, sampling), way) in enumerate(zip(requests, itertools.cycle(ways), strict=False)):
            message = EngineRequest(
                request_id=f"r{number}",
                token_ids=tuple(prompt),
                sampling=sampling,
                eos_token_ids=(1,),
                prefill=self.addresses["prefill"] if way == "remote" else None,
            )
            self.tokens[message.request_id] = []
            self.cores["prefill" if way == "prefill" else "decode"].put(CLIENT, message)
        self.finish_reasons.clear()
        deadline = Deadline.after(timeout_s)
        has_work = [True]
        while any(has_work) or len(self.finish_reasons) < len(requests):
            assert not deadline.has_passed, f"finished: {self.finish_reasons}"
            has_work = [core.step(wait_s=0.001) for core in self.cores.values()]
        assert set(self.finish_reasons.values()) <= {"stop", "length"}
        return [self.tokens[f"r{number}"] for number in range(len(requests))]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()


class _Wire:
    """Outbox of one engine: delivers to the other one, and collects what goes to the client."""

    def __init__(self, pair: Pair, own_name: str) -> None:
        self._pair = pair
        self._own_name = own_name

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        name = destination if isinstance(destination, str) else destination.peer_id
        if name in self._pair.cores:
            self._pair.cores[name].put(self._own_name, message)  # type: ignore[arg-type]
        elif name == CLIENT:
            assert isinstance(message, TokenBatch)
            for delta in message.deltas:
                known = self._pair.tokens[delta.request_id]
                assert delta.first_index == len(known), "a token was lost or repeated"
                known.extend(delta.token_ids)
                if delta.finish_reason is not None:
                    self._pair.finish_reasons[delta.request_id] = delta.finish_reason


def _open_runner(options: RunnerOptions, num_ranks: int) -> StepRunner:
    """The runner of a gang whose followers are processes of their own. One gang of several at a time."""
    if num_ranks == 1:
        return LocalRunner(build_model_runner(options))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting_point = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    sender = ShmPlanSender(tuple(range(1, num_ranks)), send_timeout_s=30.0)
    context = forking()
    pipes = []
    options = replace(options, world_size=num_ranks, init_method=meeting_point)
    for rank in range(1, num_ranks):
        ours, theirs = context.Pipe()
        arguments = (replace(options, rank=rank), sender.address, theirs)
        context.Process(target=run_follower, args=arguments, daemon=True).start()
        pipes.append(ours)
    first = build_model_runner(options)
    info = merge_rank_infos([first.info, *(pipe.recv() for pipe in pipes)])
    sender.accept(30.0)
    return GangRunner(info=info, local=LocalRunner(first), poll_local_kv=first.poll_kv, sender=sender)
