"""Stop 10 of 14: ModelRunner executes a step plan on one rank. Next: atom_cluster/models/llama/model.py.

Rows are brought up to date (runner/row_state.py) and the plan becomes a layout (runner/step_layout.py). What follows
happens on the device alone (runner/step_program.py): the layout becomes tensors (runner/inputs.py), the model computes
logits, tokens are chosen from them (runner/sampler.py), compared with the drafts that the step verifies, if any
(runner/speculation.py), and written to their rows; with speculation, the next drafts follow (runner/drafter.py). On
GPUs, steps that only decode are graphs (runner/graphs.py). All ranks of a gang execute the same plans; rank 0 samples
and sends the token ids to the others, so each rank knows the tokens of every row and the next plan needs none. Knows
rows and pages; knows no requests, policies or sockets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.messages.steps import SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.collectives import broadcast_from_first
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.drafter import Drafter, LayerDrafter
from atom_cluster.runner.graphs import StepGraphs
from atom_cluster.runner.inputs import InputBuilder
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import LogprobTensors, SamplingRow, is_plain_greedy, sample
from atom_cluster.runner.step_layout import SamplingStep, StepLayout, sampling_steps
from atom_cluster.runner.step_program import Computed, Outcome, StepProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """What a step's rows got, on its way to the host. Shape suffixes as in `runner/step_layout.py`; K drafts."""

    sampling: tuple[SamplingStep, ...]
    num_samples: tuple[int, ...]
    """[S]: how many of the samples are each row's."""
    token_ids: torch.Tensor
    """[P]"""
    logprobs: LogprobTensors | None
    num_kept: torch.Tensor | None
    """[S] drafts; None: there were none to keep."""
    drafts: torch.Tensor | None
    """[S, K]"""

    def read(self) -> tuple[SampledTokens, ...]:
        """As the engine gets it. The device must have finished the step."""
        token_ids = self.token_ids.tolist()
        num_kept = None if self.num_kept is None else self.num_kept.tolist()
        logprobs = None if self.logprobs is None else self.logprobs.read()
        drafts = None if self.drafts is None else self.drafts.tolist()
        found = []
        first = 0
        for i, (step, num_samples) in enumerate(zip(self.sampling, self.num_samples)):
            kept = slice(first, first + 1 + (0 if num_kept is None else num_kept[i]))
            own = () if logprobs is None else tuple(item for item in logprobs[kept] if item is not None)
            own_drafts = () if drafts is None else tuple(drafts[i])
            found.append(SampledTokens(step.row, tuple(token_ids[kept]), own or None, own_drafts))
            first += num_samples
        return tuple(found)


class LaunchedStep:
    """A step whose work was issued. On GPUs it may still be running; `wait` is where the host waits for it."""

    def __init__(self, plan: StepPlan, *, sampled: _Sampled | None, timer: _StepTimer) -> None:
        self._plan = plan
        self._sampled = sampled
        self._timer = timer
        timer.stop()

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._timer.is_done()

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
        ops: OpTable,
        info: RankInfo,
        device: torch.device,
        agent: KvAgent | None = None,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        """graph_sizes: rows of the decode steps that run as graphs, ascending; none on CPUs."""
        self.info = info
        self._groups = groups
        self._device = device
        self._agent = agent
        self._table = RowTable(
            num_rows=info.max_num_requests,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            groups=model.kv_layout.groups,
            num_pages=(info.num_blocks, *(group.num_pages for group in info.other_groups)),
            num_drafts=info.max_drafts,
            device=device,
        )
        self._inputs = InputBuilder(table=self._table, kv=memory.layers, place=ops.place_tokens, device=device)
        drafter: Drafter | None = None
        if info.max_drafts:
            drafter = LayerDrafter(
                model=model,
                num_drafts=info.max_drafts,
                table=self._table,
                builder=self._inputs,
                group=groups.tensor,
            )
        self._program = StepProgram(model=model, inputs=self._inputs, table=self._table, drafter=drafter)
        self.graphs: StepGraphs | None = None
        if graph_sizes:
            self.graphs = StepGraphs(
                program=self._program,
                inputs=self._inputs,
                table=self._table,
                sizes=graph_sizes,
                num_drafts=info.max_drafts,
                choose=self._choose_likeliest,
                device=device,
            )

    @property
    def computes_alone(self) -> bool:
        """Whether `launch` returns while a device computes."""
        return self._device.type != "cpu"

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a plan and wait for its result."""
        return self.launch(plan).wait()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Issue a plan's work: rows, forward pass, sampling, KV commands. On CPUs the work is done on return."""
        if self._device.type != "cpu":
            torch.cuda.set_device(self._device)  # of the calling thread: kernels are launched where it is
        timer = _StepTimer(self._device)
        self._table.apply(plan)
        sampled = self._step(plan) if plan.rows else None
        if self._agent is not None and plan.kv:
            self._agent.execute(plan.kv)
        return LaunchedStep(plan, sampled=sampled, timer=timer)

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture all steps now that would else be captured when they are first needed. All ranks call it together."""
        if self.graphs is not None:
            self.graphs.capture_all()

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports on KV commands since the last call. Never blocks; may be called from any one thread."""
        return [] if self._agent is None else self._agent.poll()

    def close(self) -> None:
        """Stop KV transfers and leave the gang; idempotent. Memory goes with the last reference to this object."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self.graphs = None  # before the groups, whose collectives they hold
        self._groups.close()

    def _step(self, plan: StepPlan) -> _Sampled | None:
        """Model, sampling and drafting; None on ranks other than 0 and when no row samples."""
        graphs = self.graphs
        if graphs is None or not graphs.takes(plan.rows):
            layout = self._inputs.lay_out(plan)
            computed = self._program.compute(layout)
            token_ids, logprobs = self._choose(computed, layout.sampling)
            return self._send(layout, layout.sampling, self._program.finish(computed, token_ids), logprobs)
        sampling = sampling_steps(plan.rows)
        is_plain = all(is_plain_greedy(self._table.get(step.row).sampling) for step in sampling)
        graphed = graphs.run(plan.rows, chooses=is_plain)
        outcome, logprobs = graphed.outcome, None
        if outcome is None:
            token_ids, logprobs = self._choose(graphed.computed, sampling)
            outcome = self._program.finish(graphed.computed, token_ids)
        return self._send(graphed.layout, sampling, outcome, logprobs)

    def _choose(
        self, computed: Computed, sampling: Sequence[SamplingStep]
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """Token ids [P] on every rank, and log probabilities on the first; rows behind `sampling` stand for none."""
        layout, logits_PV, logprobs = computed.inputs.layout, computed.logits, None
        token_ids_P = torch.zeros_like(computed.inputs.sample_position)
        if logits_PV is not None:
            rows = [
                SamplingRow(self._table.get(step.row), step.row, step.position + 1 + i)
                for step, shape in zip(sampling, layout.sampling)
                for i in range(shape.num_drafts + 1)
            ]
            sampled = sample(logits_PV[: len(rows)], rows, tokens=self._table.tokens)
            token_ids_P[: len(rows)] = sampled.token_ids
            logprobs = sampled.logprobs
        if layout.sampling:
            broadcast_from_first(token_ids_P, self._groups.tensor)
        return token_ids_P, logprobs

    def _choose_likeliest(self, computed: Computed) -> torch.Tensor:
        token_ids_P = torch.zeros_like(computed.inputs.sample_position)
        if computed.logits is not None:
            token_ids_P = computed.logits.argmax(dim=-1)
        return broadcast_from_first(token_ids_P, self._groups.tensor)

    def _send(
        self,
        layout: StepLayout,
        sampling: tuple[SamplingStep, ...],
        outcome: Outcome,
        logprobs: LogprobTensors | None,
    ) -> _Sampled | None:
        """What `sampling` got, the first rows of the layout, on its way to the host without waiting for it."""
        if not sampling or self._groups.tensor.rank > 0:
            return None
        num_kept, drafts = outcome.num_kept, outcome.drafts
        return _Sampled(
            sampling=sampling,
            num_samples=tuple(step.num_drafts + 1 for step in layout.sampling[: len(sampling)]),
            token_ids=outcome.token_ids.to("cpu", non_blocking=True),
            logprobs=logprobs,
            num_kept=num_kept.to("cpu", non_blocking=True) if layout.max_drafts else None,
            drafts=None if drafts is None else drafts.to("cpu", non_blocking=True),
        )


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

    def is_done(self) -> bool:
        """Whether what was issued before `stop` is done."""
        return self._events is None or bool(self._events[1].query())

    def wait(self) -> float:
        """Wait until what was issued before `stop` is done; seconds it took."""
        if self._events is not None:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000.0
        return self._elapsed_s
