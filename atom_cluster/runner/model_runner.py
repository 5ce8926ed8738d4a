"""Stop 10 of 14: ModelRunner executes a step plan on one rank. Next: atom_cluster/models/llama/model.py.

Rows are brought up to date (runner/row_state.py) and the plan becomes a layout (runner/step_layout.py). What follows
happens on the device alone (runner/step_program.py): the layout becomes tensors (runner/inputs.py), the model computes
logits, prompts are scored where a request asks for it (runner/prompt_scores.py), tokens are chosen from logits
(runner/sampler.py), compared with the drafts that the step verifies, if any (runner/speculation.py), and written to
their rows; with speculation, the next drafts follow (runner/drafter.py). On GPUs, steps that only decode are graphs
(runner/graphs.py), and small ones with prompts pieces of graphs (runner/pieces.py). All ranks of a gang execute the
same plans and choose the same tokens, so each rank knows the tokens of every row and the next plan needs none. Knows
rows and pages; knows no requests, policies or sockets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from atom_cluster.config.observability import ProfileConfig
from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.messages.steps import Execution, SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.sampling import Draw
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.collectives import smallest
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.drafter import Drafter, LayerDrafter
from atom_cluster.runner.grammar_rows import GrammarRows, PendingMasks
from atom_cluster.runner.graphs import StepGraphs
from atom_cluster.runner.inputs import InputBuilder
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.pieces import PiecewiseForward
from atom_cluster.runner.prompt_scores import PendingScores, PromptScorer
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import LogprobTensors, Samples, TokenMasks, choose, sample
from atom_cluster.runner.step_layout import SamplingStep, StepLayout, sampling_steps
from atom_cluster.runner.step_profiler import LabelledDrafter, StepProfiler
from atom_cluster.runner.step_program import Computed, Outcome, StepProgram
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.held import HeldGrammars

_log = logging.getLogger(__name__)


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
    errors: Mapping[int, str]
    """By row, why it cannot go on."""

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
            error = self.errors.get(step.row)
            found.append(SampledTokens(step.row, tuple(token_ids[kept]), own or None, own_drafts, error))
            first += num_samples
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """What was chosen for a step's samples."""

    token_ids: torch.Tensor
    """[P], equal on all ranks."""
    logprobs: LogprobTensors | None = None
    """On the first rank."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """By row, why it cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    """What a step's rows get, on its way to the host. On the first rank only."""

    sampled: _Sampled | None = None
    """None when no row samples."""
    scores: PendingScores | None = None
    """None when no row asks for them."""


class LaunchedStep:
    """A step whose work was issued. On GPUs it may still be running; `wait` is where the host waits for it."""

    def __init__(
        self,
        plan: StepPlan,
        *,
        outputs: _Outputs,
        execution: Execution,
        compiled: tuple[tuple[str, float], ...],
        timer: _StepTimer,
    ) -> None:
        self._plan = plan
        self._compiled = compiled
        self._execution = execution
        self._outputs = outputs
        self._timer = timer
        timer.stop()

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._timer.is_done()

    def wait(self) -> StepResult:
        """The result; nothing is in it on ranks other than 0. May be called from another thread than `launch`."""
        run_s = self._timer.wait()
        sampled, scores = self._outputs.sampled, self._outputs.scores
        return StepResult(
            step_id=self._plan.step_id,
            sampled=() if sampled is None else sampled.read(),
            prompt_scores=() if scores is None else scores.read(),
            run_s=run_s,
            execution=self._execution,
            compiled=self._compiled,
        )


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
        profile: ProfileConfig | None = None,
        grammars: GrammarCompiler | None = None,
        graph_sizes: Sequence[int] = (),
        piecewise_sizes: Sequence[int] = (),
    ) -> None:
        """grammars: for rows that have one; None: no row may. graph_sizes: rows of the decode steps that run as graphs,
        ascending; none on CPUs. piecewise_sizes: tokens of the steps with prompts that run in pieces."""
        self.info = info
        self._groups = groups
        self._device = device
        self._ops = ops
        self._agent = agent
        self._profiler = StepProfiler(profile or ProfileConfig(), rank=info.rank, device=device)
        self._table = RowTable(
            num_rows=info.max_num_requests,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            groups=model.kv_layout.groups,
            num_pages=(info.num_blocks, *(group.num_pages for group in info.other_groups)),
            num_drafts=info.max_drafts,
            device=device,
        )
        self._grammars = GrammarRows(held=HeldGrammars(grammars), num_drafts=info.max_drafts, device=device)
        self._inputs = InputBuilder(table=self._table, kv=memory.layers, place=ops.place_tokens, device=device)
        drafter: Drafter | None = None
        if info.max_drafts:
            drafter = LayerDrafter(
                model=model,
                num_drafts=info.max_drafts,
                table=self._table,
                builder=self._inputs,
                ops=ops,
            )
            drafter = LabelledDrafter(drafter, self._profiler, info.max_drafts)
        self._program = StepProgram(model=model, inputs=self._inputs, table=self._table, ops=ops, drafter=drafter)
        self._scorer = PromptScorer(model, self._table, is_first_rank=groups.tensor.rank == 0)
        self.graphs: StepGraphs | None = None
        self.pieces: PiecewiseForward | None = None
        pool = torch.cuda.graph_pool_handle() if graph_sizes or piecewise_sizes else None
        if piecewise_sizes:
            self.pieces = PiecewiseForward(
                model=model,
                inputs=self._inputs,
                table=self._table,
                ops=ops,
                sizes=piecewise_sizes,
                pool=pool,
                device=device,
            )
        if graph_sizes:
            self.graphs = StepGraphs(
                program=self._program,
                inputs=self._inputs,
                table=self._table,
                sizes=graph_sizes,
                num_drafts=info.max_drafts,
                choose=self._choose_in_graph,
                pool=pool,
                device=device,
            )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

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
        with self._profiler.around(plan):
            return self._issue(plan)

    def _issue(self, plan: StepPlan) -> LaunchedStep:
        timer = _StepTimer(self._device)
        self._ops.take_compiled()  # what was before
        self._table.apply(plan)
        self._grammars.apply(plan)
        if self._agent is not None and plan.kv:
            # They are about blocks of earlier steps, and need not wait for this one.
            self._agent.execute(plan.kv)
        execution: Execution = "eager"
        outputs = _Outputs()
        if plan.rows:
            execution = self._execution_of(plan)
            outputs = self._step(plan, self.graphs if execution == "graph" else None)
        compiled = self._ops.take_compiled()
        return LaunchedStep(plan, outputs=outputs, execution=execution, compiled=compiled, timer=timer)

    def _execution_of(self, plan: StepPlan) -> Execution:
        """How a step with rows will be run."""
        if self.graphs is not None and self.graphs.takes(plan.rows):
            return "graph"
        return "pieces" if self.pieces is not None and self.pieces.takes(plan.num_tokens) else "eager"

    @torch.inference_mode()
    def capture_graphs(self) -> dict[str, str]:
        """Capture all steps now that would else be captured when they are first needed. All ranks call it together.

        What this model has that cannot be captured is then not tried again; by kind of graph, why.
        """
        problems: dict[str, str] = {}
        if self.graphs is not None and (problem := self._try_capture(self.graphs.capture_all)) is not None:
            self.graphs, problems["full"] = None, problem
        pieces = self.pieces
        if pieces is not None:
            problem = self._try_capture(lambda: pieces.record_all(self._do_all_say))
            if problem is not None:
                self.pieces, problems["pieces"] = None, problem
        return problems

    def warm_up_grammars(self) -> None:
        """Do now what else the first request with a grammar waits for, and others with it."""
        self._grammars.warm_up()

    def _try_capture(self, capture: Callable[[], None]) -> str | None:
        """Why it failed, on this rank or another."""
        problem: str | None = None
        try:
            capture()
        except RuntimeError as exc:
            problem = str(exc).splitlines()[0]
            _log.warning("not captured in graphs: %s", exc)
        return None if self._do_all_say(problem is None) else problem or "another rank could not capture"

    def _do_all_say(self, is_so: bool) -> bool:  # noqa: FBT001 - the answer
        return smallest(int(is_so), self._groups.tensor, self._device) == 1

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports on KV commands, profiler windows and grammars since the last call. Never blocks; may be
        called from any one thread."""
        grammars = [RankReport(rank=self.info.rank, report=ready) for ready in self._grammars.poll()]
        return [*self._profiler.poll(), *([] if self._agent is None else self._agent.poll()), *grammars]

    def close(self) -> None:
        """Stop KV transfers and leave the gang; idempotent. Memory goes with the last reference to this object."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._profiler.close()
        self._grammars.close()
        self.graphs = self.pieces = None  # before the groups, whose collectives they hold
        self._groups.close()

    def _step(self, plan: StepPlan, graphs: StepGraphs | None) -> _Outputs:
        """Model, scores of prompts, sampling and drafting. graphs: None: not one of theirs."""
        pending = self._grammars.read(plan.rows, self._table)
        if graphs is None:
            layout = self._inputs.lay_out(plan)
            computed = self._program.compute(layout, pieces=self.pieces)
            scores = self._scorer.score(plan.rows, layout.query_start_cpu, computed.hidden)
            chosen = self._choose(computed, layout.sampling, pending)
            outcome = self._program.finish(computed, chosen.token_ids, self._draw(layout.sampling))
            return _Outputs(sampled=self._send(layout, layout.sampling, outcome, chosen), scores=scores)
        sampling = sampling_steps(plan.rows)
        draw = self._draw(sampling)
        # What only some requests ask for is no part of graphs.
        is_captured = all(self._table.get(step.row).is_plain for step in sampling)
        graphed = graphs.run(plan.rows, draw if is_captured else None)
        if graphed.outcome is not None:
            chosen = _Chosen(token_ids=graphed.outcome.token_ids)
            return _Outputs(sampled=self._send(graphed.layout, sampling, graphed.outcome, chosen))
        chosen = self._choose(graphed.computed, sampling, pending)
        outcome = self._program.finish(graphed.computed, chosen.token_ids, draw)
        return _Outputs(sampled=self._send(graphed.layout, sampling, outcome, chosen))

    def _choose(self, computed: Computed, sampling: Sequence[SamplingStep], pending: PendingMasks | None) -> _Chosen:
        """Tokens for a step that was issued; rows behind `sampling` stand for none."""
        inputs = computed.inputs
        if computed.logits is None:
            return _Chosen(token_ids=torch.zeros_like(inputs.sample_position))
        masks: TokenMasks | None = None
        errors: Mapping[int, str] = {}
        if pending is not None:
            masks, errors = pending.wait([step.num_drafts + 1 for step in inputs.layout.sampling])
        samples = Samples(
            row=inputs.sample_row,
            position=inputs.sample_position,
            samplings=tuple(
                self._table.get(step.row).sampling
                for step, shape in zip(sampling, inputs.layout.sampling)
                for _ in range(shape.num_drafts + 1)
            ),
        )
        sampled = sample(computed.logits, samples, table=self._table, ops=self._ops, masks=masks)
        return _Chosen(token_ids=sampled.token_ids, logprobs=sampled.logprobs, errors=errors)

    def _draw(self, sampling: Sequence[SamplingStep]) -> Draw:
        """What it takes to choose tokens for these rows."""
        return max((self._table.get(step.row).draw for step in sampling), default=Draw.GREEDY)

    def _choose_in_graph(self, computed: Computed, draw: Draw) -> torch.Tensor:
        assert computed.logits is not None, "every row of a captured step samples"
        inputs, params = computed.inputs, self._table.sampling.tensors
        return choose(computed.logits, inputs.sample_row, inputs.sample_position, params, draw=draw, ops=self._ops)

    def _send(
        self,
        layout: StepLayout,
        sampling: tuple[SamplingStep, ...],
        outcome: Outcome,
        chosen: _Chosen,
    ) -> _Sampled | None:
        """What `sampling` got, the first rows of the layout, on its way to the host without waiting for it."""
        if not sampling or self._groups.tensor.rank > 0:
            return None
        num_kept, drafts = outcome.num_kept, outcome.drafts
        return _Sampled(
            sampling=sampling,
            num_samples=tuple(step.num_drafts + 1 for step in layout.sampling[: len(sampling)]),
            token_ids=outcome.token_ids.to("cpu", non_blocking=True),
            logprobs=chosen.logprobs,
            errors=chosen.errors,
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
