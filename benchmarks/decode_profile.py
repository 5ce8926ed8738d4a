"""What steady decode steps spend their time on: how long the GPU is idle, and the kernels, from a profiler's window.

    python -m benchmarks.decode_profile --model shape:llama_8b --workload 1x128x96 32x1024x96

A workload is requests x prompt tokens x output tokens. The window opens when every request has had a few tokens, and is
of steps that all decode. A period is from the start of a step on the GPU to the start of the next one, so idle time
counts between steps as well as inside of them; while the profiler records, the host is slower than otherwise.
`benchmarks/latency.py` times steps without one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass

import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.llm_engine import StreamedOutput
from atom_cluster.tools.trace.breakdown import KernelRow, Phase, break_down, percentile
from atom_cluster.tools.trace.events import read_trace
from benchmarks.offline_throughput import Workload, add_engine_arguments, open_engine
from benchmarks.records import save_record
from benchmarks.shapes import model_dir

NUM_STEPS = 40
"""In a window, unless the workload is shorter."""
_NUM_SETTLING_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Decode steps of one workload."""

    workload: Workload
    phase: str
    num_steps: int
    period_us: float
    """The median."""
    step_p50_us: float
    step_p99_us: float
    idle_share: float
    """Of the mean period."""
    us_by_group: dict[str, float]
    """Per step."""
    kernels: list[KernelRow]
    """The most time first."""

    @classmethod
    def of(cls, workload: Workload, phase: Phase) -> Row:
        """Of the phase that most steps of a window were of."""
        return cls(
            workload=workload,
            phase=phase.name,
            num_steps=len(phase.steps),
            period_us=statistics.median(phase.period_us),
            step_p50_us=percentile(phase.step_us, 50),
            step_p99_us=percentile(phase.step_us, 99),
            idle_share=1.0 - phase.busy_us / statistics.mean(phase.period_us),
            us_by_group=phase.us_by_group,
            kernels=list(phase.rows),
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save if asked to."""
    args = parse_arguments(arguments)
    directory = model_dir(args.model)
    rows = []
    with (
        tempfile.TemporaryDirectory() as traces,
        open_engine(directory, args, profile=ProfileConfig(directory=traces)) as engine,
    ):
        for workload in args.workload:
            rows.append(Row.of(workload, record(engine, workload)))
            print_row(rows[-1], args.top)
        choices = dict(engine.info.choices)
    if args.save:
        details = {"choices": choices, "rows": [asdict(row) for row in rows]}
        print(f"saved {save_record('decode_profile', args.label or directory.name, details)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Workload.parse, nargs="+", default=[Workload(1, 128, 96)])
    parser.add_argument("--top", type=int, default=16, help="kernels to print")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    parser.add_argument("--label", help="name of the saved result; the model's if not given")
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def record(engine: LLMEngine, workload: Workload) -> Phase:
    """The phase that most steps of a window belong to; the workload runs once before, so that nothing is compiled."""
    if workload.output_len < 2 * _NUM_SETTLING_TOKENS:
        raise SystemExit(f"{workload} has too few output tokens: at least {2 * _NUM_SETTLING_TOKENS}")
    generator = torch.Generator().manual_seed(0)
    for is_recorded in (False, True):
        shape = (workload.num_requests, workload.input_len)
        prompts = torch.randint(engine.info.vocab_size, shape, generator=generator).tolist()
        counts: dict[str, int] = {}

        def count(output: StreamedOutput, counts: dict[str, int] = counts) -> None:
            counts[output.request_id] += len(output.token_ids)

        params = SamplingParams(temperature=0.0, max_tokens=workload.output_len, ignore_eos=True)
        counts.update((name, 0) for name in engine.add_request(prompts, params, stream_callback=count))
        while is_recorded and min(counts.values()) < _NUM_SETTLING_TOKENS:
            engine.step()
        if is_recorded:
            engine.start_profile(num_steps=NUM_STEPS)
        while not engine.is_finished():
            engine.step()
    trace = engine.stop_profile()[0]
    phases = [phase for phase in break_down(read_trace(trace)).phases if phase.name.startswith("decode")]
    if not phases or len(phases[0].period_us) < 2:
        raise SystemExit(f"the window of {workload} has fewer than three steps that decode")
    return phases[0]


def print_row(row: Row, num_kernels: int) -> None:
    """A line, the groups, and the kernels."""
    w = row.workload
    print(
        f"{w.num_requests} x {w.input_len} + {w.output_len}   {row.phase}   period {row.period_us:.0f} us   "
        f"step p50 {row.step_p50_us:.0f} us, p99 {row.step_p99_us:.0f} us   idle {row.idle_share:.1%}"
    )
    print("   " + "   ".join(f"{group} {us:.0f}" for group, us in row.us_by_group.items()))
    for kernel in row.kernels[:num_kernels]:
        print(
            f"   {kernel.us_per_step:9.1f} us   {kernel.calls_per_step:6.1f} x {kernel.mean_us:8.2f} us   "
            f"{kernel.group:10} {kernel.name[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
