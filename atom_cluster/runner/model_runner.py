"""Stop 10 of 14: ModelRunner executes a step plan on one rank. Next: atom_cluster/models/llama/model.py.

Rows are brought up to date (runner/row_state.py), the plan becomes tensors (runner/inputs.py), the model computes
logits, tokens are chosen from them (runner/sampler.py) and written to their rows. All ranks of a gang execute the same
plans; rank 0 samples and sends the token ids to the others, so each rank knows the tokens of every row and the next
plan needs none. Knows rows and blocks; knows no requests, policies or sockets.
"""

from __future__ import annotations

import time

import torch

from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.messages.steps import SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport
from atom_cluster.models.protocol import CausalLM
from atom_cluster.parallel.collectives import broadcast_from_first
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.inputs import InputBuilder, StepInputs
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import SampledBatch, SamplingRow, sample


class LaunchedStep:
    """A step whose work was issued. On GPUs it may still be running; `wait` is where the host waits for it."""

    def __init__(
        self, plan: StepPlan, *, inputs: StepInputs | None, sampled: SampledBatch | None, timer: _StepTimer
    ) -> None:
        self._plan = plan
        self._inputs = inputs
        self._logprobs = None if sampled is None else sampled.logprobs
        self._token_ids = None if sampled is None else sampled.token_ids.to("cpu", non_blocking=True)
        self._timer = timer
        timer.stop()

    def wait(self) -> StepResult:
        """The result; empty `sampled` on ranks other than 0. May be called from another thread than `launch`."""
        run_s = self._timer.wait()
        if self._inputs is None or self._token_ids is None:
            return StepResult(step_id=self._plan.step_id, run_s=run_s)
        token_ids = self._token_ids.tolist()
        rows = self._inputs.sampled_rows
        if self._logprobs is None:
            sampled = tuple(SampledTokens(row, (token_id,)) for row, token_id in zip(rows, token_ids))
        else:
            logprobs = self._logprobs.read()
            sampled = tuple(
                SampledTokens(row, (token_id,), None if found is None else (found,))
                for row, token_id, found in zip(rows, token_ids, logprobs)
            )
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
            device=device,
        )
        self._inputs = InputBuilder(table=self._table, kv=memory.layers, device=device)

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
        return LaunchedStep(plan, inputs=inputs, sampled=sampled, timer=timer)

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports on KV commands since the last call. Never blocks; may be called from any one thread."""
        return [] if self._agent is None else self._agent.poll()

    def close(self) -> None:
        """Stop KV transfers and leave the gang; idempotent. Memory goes with the last reference to this object."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._groups.close()

    def _forward(self, inputs: StepInputs) -> SampledBatch | None:
        """Model and sampling; None on ranks other than 0 and when no row samples."""
        hidden_TD = self._model.forward(inputs.batch)
        if not inputs.sampled_rows:
            return None
        logits_SV = self._model.compute_logits(hidden_TD[inputs.batch.sample_index])
        sampled = None if logits_SV is None else self._sample(logits_SV, inputs)
        if sampled is None:
            token_ids = torch.empty(len(inputs.sampled_rows), dtype=torch.int64, device=self._device)
        else:
            token_ids = sampled.token_ids
        broadcast_from_first(token_ids, self._groups.tensor)
        self._table.append(inputs.row_index, inputs.position_index, token_ids)
        return sampled

    def _sample(self, logits_SV: torch.Tensor, inputs: StepInputs) -> SampledBatch:
        rows = [
            SamplingRow(self._table.get(row), row, position)
            for row, position in zip(inputs.sampled_rows, inputs.sampled_positions)
        ]
        return sample(logits_SV, rows, tokens=self._table.tokens)


class _StepTimer:
    """Seconds that a step took: by the host's clock on CPUs, by the device's on GPUs."""

    def __init__(self, device: torch.device) -> None:
        self._started_s = time.perf_counter()
        self._elapsed_s = 0.0
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":
            self._events = (torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True))
            self._events[0].record()

    def stop(self) -> None:
        """Everything of the step was issued."""
        self._elapsed_s = time.perf_counter() - self._started_s
        if self._events is not None:
            self._events[1].record()

    def wait(self) -> float:
        """Wait until what was issued before `stop` is done; seconds it took."""
        if self._events is not None:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000.0
        return self._elapsed_s
