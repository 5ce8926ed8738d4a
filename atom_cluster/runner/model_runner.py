"""Stop 10 of 14: ModelRunner executes a step plan on one rank. Next: atom_cluster/models/llama/model.py.

Rows are brought up to date (runner/row_state.py), the plan becomes tensors (runner/inputs.py), the model computes
logits, tokens are chosen from them (runner/sampler.py), compared with the drafts that the step verifies, if any
(runner/speculation.py), and written to their rows; with speculation, the next drafts follow (runner/drafter.py). All
ranks of a gang execute the same plans; rank 0 samples and sends the token ids to the others, so each rank knows the
tokens of every row and the next plan needs none. Knows rows and pages; knows no requests, policies or sockets.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.messages.steps import SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport
from atom_cluster.models.protocol import CausalLM
from atom_cluster.parallel.collectives import broadcast_from_first
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.drafter import Drafter, LayerDrafter
from atom_cluster.runner.inputs import InputBuilder, SamplingStep, StepInputs
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import LogprobTensors, SampledBatch, SamplingRow, sample
from atom_cluster.runner.speculation import keep_states, verify_drafts


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What a step's rows got. Shape suffixes as in `runner/inputs.py`; K drafts."""

    sampling: tuple[SamplingStep, ...]
    token_ids: torch.Tensor
    """[P]"""
    logprobs: LogprobTensors | None
    num_kept: torch.Tensor
    """[S] drafts"""
    drafts: torch.Tensor | None
    """[S, K]"""

    def on_host(self) -> _Sampled:
        """The same on its way to the host, without waiting for it."""
        return replace(
            self,
            token_ids=self.token_ids.to("cpu", non_blocking=True),
            num_kept=self.num_kept.to("cpu", non_blocking=True),
            drafts=None if self.drafts is None else self.drafts.to("cpu", non_blocking=True),
        )

    def read(self) -> tuple[SampledTokens, ...]:
        """As the engine gets it. The device must have finished the step."""
        token_ids, num_kept = self.token_ids.tolist(), self.num_kept.tolist()
        logprobs = None if self.logprobs is None else self.logprobs.read()
        drafts = [()] * len(num_kept) if self.drafts is None else self.drafts.tolist()
        found = []
        first = 0
        for i, step in enumerate(self.sampling):
            kept = slice(first, first + num_kept[i] + 1)
            own = () if logprobs is None else tuple(item for item in logprobs[kept] if item is not None)
            found.append(SampledTokens(step.row, tuple(token_ids[kept]), own or None, tuple(drafts[i])))
            first += step.num_drafts + 1
        return tuple(found)


class LaunchedStep:
    """A step whose work was issued. On GPUs it may still be running; `wait` is where the host waits for it."""

    def __init__(self, plan: StepPlan, *, sampled: _Sampled | None, timer: _StepTimer) -> None:
        self._plan = plan
        self._sampled = None if sampled is None else sampled.on_host()
        self._timer = timer
        timer.stop()

    def wait(self) -> StepResult:
        """The result; empty `sampled` on ranks other than 0. May be called from another thread than `launch`."""
        run_s = self._timer.wait()
        sampled = () if self._sampled is None else self._sampled.read()
        return StepResult(step_id=self._plan.step_id, sampled=sampled, run_s=run_s)


class ModelRunner:
    """One rank: a loaded model, its KV memory, its rows. Made by `runner.build`; all calls from one thread.

    Owns everything it was given and releases it in `close`. After an exception from `launch` it is unusable, since its
    rows no longer agree with the engine's.
    """

    def __init__(
        self,
        *,
        model: CausalLM,
        groups: ProcessGroups,
        memory: KvMemory,
        info: RankInfo,
        device: torch.device,
        agent: KvAgent | None = None,
    ) -> None:
        self.info = info
        self._model = model
        self._groups = groups
        self._device = device
        self._agent = agent
        self._table = RowTable(
            num_rows=info.max_num_requests,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            groups=model.kv_layout.groups,
            num_drafts=info.max_drafts,
            device=device,
        )
        self._inputs = InputBuilder(table=self._table, kv=memory.layers, device=device)
        self._drafter: Drafter | None = None
        if info.max_drafts:
            self._drafter = LayerDrafter(
                model=model,
                num_drafts=info.max_drafts,
                table=self._table,
                builder=self._inputs,
                group=groups.tensor,
            )

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a plan and wait for its result."""
        return self.launch(plan).wait()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Issue a plan's work: rows, forward pass, sampling, KV commands. On CPUs the work is done on return."""
        timer = _StepTimer(self._device)
        self._table.apply(plan)
        inputs = self._inputs.build(plan) if plan.rows else None
        sampled = None if inputs is None else self._forward(inputs)
        if self._agent is not None and plan.kv:
            self._agent.execute(plan.kv)
        return LaunchedStep(plan, sampled=sampled, timer=timer)

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports on KV commands since the last call. Never blocks; may be called from any one thread."""
        return [] if self._agent is None else self._agent.poll()

    def close(self) -> None:
        """Stop KV transfers and leave the gang; idempotent. Memory goes with the last reference to this object."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._groups.close()

    def _forward(self, inputs: StepInputs) -> _Sampled | None:
        """Model, sampling and drafting; None on ranks other than 0 and when no row samples."""
        hidden_TD = self._model.forward(inputs.batch)
        sampled = self._sample(inputs, hidden_TD)
        token_ids = torch.empty_like(inputs.sample_row) if sampled is None else sampled.token_ids
        if inputs.sampling:
            broadcast_from_first(token_ids, self._groups.tensor)
        num_kept_S = verify_drafts(token_ids, inputs, self._table)
        # Those behind the last kept one are written too: drafts or the next tokens will replace them.
        self._table.append(inputs.sample_row, inputs.sample_position, token_ids)
        keep_states(inputs, num_kept_S, self._table)
        drafts_SK = None if self._drafter is None else self._drafter.draft(inputs, hidden_TD, num_kept_S)
        return (
            None if sampled is None else _Sampled(inputs.sampling, token_ids, sampled.logprobs, num_kept_S, drafts_SK)
        )

    def _sample(self, inputs: StepInputs, hidden_TD: torch.Tensor) -> SampledBatch | None:
        if not inputs.sampling:
            return None
        logits_PV = self._model.compute_logits(hidden_TD[inputs.batch.sample_index])
        if logits_PV is None:
            return None
        rows = [
            SamplingRow(self._table.get(step.row), step.row, step.position + 1 + i)
            for step in inputs.sampling
            for i in range(step.num_drafts + 1)
        ]
        return sample(logits_PV, rows, tokens=self._table.tokens)


class _StepTimer:
    """Seconds that a step took: by the host's clock on CPUs, by the device's on GPUs."""

    def __init__(self, device: torch.device) -> None:
        self._started_s = time.perf_counter()
        self._elapsed_s = 0.0
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":
            # Named, since the calling thread's current device may be another.
            self._stream = torch.accelerator.current_stream(device)
            self._events = (torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True))
            self._events[0].record(self._stream)

    def stop(self) -> None:
        """Everything of the step was issued."""
        self._elapsed_s = time.perf_counter() - self._started_s
        if self._events is not None:
            self._events[1].record(self._stream)

    def wait(self) -> float:
        """Wait until what was issued before `stop` is done; seconds it took."""
        if self._events is not None:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000.0
        return self._elapsed_s
