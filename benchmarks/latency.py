"""Time to first token and between tokens of one batch at a time, for any model and batch size.

    python -m benchmarks.latency --model shape:llama_8b --workload 1x128x512 32x1024x256

A workload is requests x prompt tokens x output tokens, all added at once to an idle engine; `shape:NAME` is a model of
dummy weights (benchmarks/shapes.py). Tokens are counted as they come out of `LLMEngine.step`: TTFT is until a request's
first one, ITL between two batches of tokens of one request; while prompts are computed, others wait, so ITL's slowest
are those of the beginning. `step` is what the device spent on steps that only decode.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass

import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.llm_engine import StreamedOutput
from atom_cluster.observability.metrics import STEP_S, STEP_TOKENS, Metric, NullMetrics
from benchmarks.offline_throughput import Workload, add_engine_arguments, open_engine
from benchmarks.records import save_record
from benchmarks.report import percentile
from benchmarks.shapes import model_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Milliseconds."""

    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of at least one value."""
        return cls(
            mean=1000 * sum(seconds) / len(seconds),
            p50=1000 * percentile(seconds, 50),
            p99=1000 * percentile(seconds, 99),
            max=1000 * max(seconds),
        )

    def __str__(self) -> str:
        return f"mean {self.mean:8.3f}  p50 {self.p50:8.3f}  p99 {self.p99:8.3f}  max {self.max:8.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload, over all repeats."""

    workload: Workload
    e2e_ms: Spread
    ttft_ms: Spread
    itl_ms: Spread
    step_ms: Spread
    tpot_ms: Spread
    """(last token - first token) / (tokens - 1), per request."""


class StepTimes(NullMetrics):
    """Seconds of the engine's steps that compute at most so many tokens."""

    def __init__(self) -> None:
        self.max_tokens = 0
        self.seconds: list[float] = []
        self._last_s = 0.0

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Seconds come first, then tokens of the same step."""
        if metric is STEP_S:
            self._last_s = value
        elif metric is STEP_TOKENS and value <= self.max_tokens:
            self.seconds.append(self._last_s)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save if asked to."""
    args = parse_arguments(arguments)
    directory = model_dir(args.model)
    rows = []
    steps = StepTimes()
    with open_engine(directory, args, metrics=steps) as engine:
        for workload in args.workload:
            rows.append(measure(engine, steps, workload, repeats=args.repeats))
            print_row(rows[-1])
        choices = dict(engine.info.choices)
    if args.save:
        details = {"choices": choices, "rows": [asdict(row) for row in rows]}
        print(f"saved {save_record('latency', args.label or directory.name, details)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Workload.parse, nargs="+", default=[Workload(1, 128, 128)])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    parser.add_argument("--label", help="name of the saved result; the model's if not given")
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def measure(engine: LLMEngine, steps: StepTimes, workload: Workload, *, repeats: int) -> Row:
    """One workload, several times, with new prompts each time; the first, which warms up, does not count."""
    generator = torch.Generator().manual_seed(0)
    e2e_s: list[float] = []
    ttft_s: list[float] = []
    itl_s: list[float] = []
    tpot_s: list[float] = []
    for repeat in range(1 + repeats):
        shape = (workload.num_requests, workload.input_len)
        prompts = torch.randint(engine.info.vocab_size, shape, generator=generator).tolist()
        steps.max_tokens = workload.num_requests
        started_s, times = time_tokens(engine, prompts, workload.output_len)
        if repeat == 0:
            steps.seconds.clear()
            continue
        for of_request in times:
            ttft_s.append(of_request[0] - started_s)
            e2e_s.append(of_request[-1] - started_s)
            itl_s += [after - before for before, after in zip(of_request, of_request[1:])]
            if workload.output_len > 1:
                tpot_s.append((of_request[-1] - of_request[0]) / (workload.output_len - 1))
    steps.seconds, seconds = [], steps.seconds
    return Row(
        workload=workload,
        e2e_ms=Spread.of(e2e_s),
        ttft_ms=Spread.of(ttft_s),
        itl_ms=Spread.of(itl_s or [0.0]),
        step_ms=Spread.of(seconds or [0.0]),
        tpot_ms=Spread.of(tpot_s or [0.0]),
    )


def time_tokens(engine: LLMEngine, prompts: list[list[int]], output_len: int) -> tuple[float, list[list[float]]]:
    """When the requests were added, and when tokens of each came out."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    times: dict[str, list[float]] = {}

    def note(output: StreamedOutput) -> None:
        times[output.request_id].append(time.perf_counter())

    started_s = time.perf_counter()
    times.update((name, []) for name in engine.add_request(prompts, params, stream_callback=note))
    while not engine.is_finished():
        engine.step()
    return started_s, list(times.values())


def print_row(row: Row) -> None:
    """A few lines."""
    w = row.workload
    print(f"{w.num_requests} x {w.input_len} + {w.output_len}, milliseconds")
    for name in ("ttft_ms", "step_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        print(f"  {name.removesuffix('_ms').upper():5}{getattr(row, name)}", flush=True)


if __name__ == "__main__":
    main()
