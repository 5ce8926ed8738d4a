"""What steps spend their time on: how long the GPU is idle, and the kernels, from a profiler's window.

    python -m benchmarks.step_profile --model shape:llama_8b --workload 1x128x64 32x1024x64

A workload is requests x prompt tokens x output tokens, all added at once; it runs once before the window, which is of
all its steps. Steps that do the same work are one phase (docs/profiling.md). A period is from the start of a step on
the GPU to the start of the next one of its phase: idle time counts between steps as well as inside of them. While the
profiler records, the host is slower than otherwise: `benchmarks/latency.py` times steps without one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass

import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.tools.trace.breakdown import KernelRow, Phase, break_down, percentile
from atom_cluster.tools.trace.events import read_trace
from benchmarks.offline_throughput import Workload, add_engine_arguments, open_engine
from benchmarks.records import save_record
from benchmarks.shapes import model_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A phase of one workload."""

    workload: Workload
    phase: str
    num_steps: int
    period_us: float
    """The median."""
    step_p50_us: float
    step_p99_us: float
    idle_share: float
    """Of the periods."""
    us_by_group: dict[str, float]
    """Per step."""
    kernels: list[KernelRow]
    """The most time first."""

    @classmethod
    def of(cls, workload: Workload, phase: Phase) -> Row:
        """Of a phase with at least two steps in a row."""
        return cls(
            workload=workload,
            phase=phase.name,
            num_steps=len(phase.steps),
            period_us=statistics.median(phase.period_us),
            step_p50_us=percentile(phase.step_us, 50),
            step_p99_us=percentile(phase.step_us, 99),
            idle_share=phase.idle_of_periods,
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
            for phase in record(engine, workload):
                rows.append(Row.of(workload, phase))
                print_row(rows[-1], args.top)
        choices = dict(engine.info.choices)
    if args.save:
        details = {"choices": choices, "rows": [asdict(row) for row in rows]}
        print(f"saved {save_record('step_profile', args.label or directory.name, details)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Workload.parse, nargs="+", default=[Workload(1, 128, 64)])
    parser.add_argument("--top", type=int, default=16, help="kernels to print")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    parser.add_argument("--label", help="name of the saved result; the model's if not given")
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def record(engine: LLMEngine, workload: Workload) -> list[Phase]:
    """The phases of a workload that have two steps in a row; the longest first."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0.0, max_tokens=workload.output_len, ignore_eos=True)
    for is_recorded in (False, True):
        shape = (workload.num_requests, workload.input_len)
        prompts = torch.randint(engine.info.vocab_size, shape, generator=generator).tolist()
        if is_recorded:
            engine.start_profile()
        engine.generate(prompts, params)
    (trace, *_) = engine.stop_profile()
    found = [phase for phase in break_down(read_trace(trace)).phases if phase.period_us]
    trace.unlink()
    return found


def print_row(row: Row, num_kernels: int) -> None:
    """A line, the groups, and the kernels."""
    w = row.workload
    print(
        f"{w.num_requests} x {w.input_len} + {w.output_len}   {row.phase}   {row.num_steps} steps   "
        f"period {row.period_us:.0f} us   step p50 {row.step_p50_us:.0f} us, p99 {row.step_p99_us:.0f} us   "
        f"idle {row.idle_share:.1%}"
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
