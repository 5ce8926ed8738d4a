"""A workload of random prompts with a profiler window around it; prints where the traces are and what is in them.

    python -m atom_cluster.tools.profile_offline --model Qwen/Qwen3-0.6B --load-dummy --bs 32 \\
        --random-input-len 1024 --random-output-len 64

Takes ATOM's engine options; see `tools/engine_arguments.py`. The workload runs once before the window, so that nothing
is compiled or captured in it. docs/profiling.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atom_cluster.errors import AtomClusterError
from atom_cluster.llm_engine import LLMEngine
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.tools.engine_arguments import add_engine_arguments, engine_arguments, kebab
from atom_cluster.tools.trace.summary import analyze_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, record and print. Returns the exit status; 1 for an error it printed."""
    parser = argparse.ArgumentParser(
        prog="profile_offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser)
    parser.set_defaults(torch_profiler_dir="traces", enable_prefix_caching=False)
    parser.add_argument("--bs", type=int, default=1, help="requests at the same time")
    parser.add_argument("--random-input-len", "--input-length", type=int, default=128, help="prompt tokens of each")
    parser.add_argument("--random-output-len", "--output-length", type=int, default=32, help="output tokens of each")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-steps", type=int, help="the window ends after so many steps")
    parser.add_argument("--with-stack", action="store_true", help="record where in the code each op was called")
    parser.add_argument("--record-shapes", action="store_true", help="record the shapes of each op's inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--no-tables", action="store_true", help="write the traces alone")
    options = parser.parse_args(kebab(sys.argv[1:] if arguments is None else arguments))
    try:
        traces = _record(options)
        for trace in traces:
            print(f"trace: {trace}")
        if not options.no_tables:
            print(analyze_trace(traces[0], None))
    except AtomClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _record(options: argparse.Namespace) -> list[Path]:
    """Traces of all ranks."""
    engine_options = engine_arguments(options)
    for note in engine_options.notes:
        print(f"note: {note}")
    rng = random.Random(options.seed)
    with engine_options.open() as engine:
        for name, choice in engine.info.choices.items():
            print(f"{name}: {choice}")
        _run(engine, options, rng)
        engine.start_profile(
            num_steps=options.num_steps,
            with_stack=options.with_stack or None,
            record_shapes=options.record_shapes or None,
        )
        seconds = _run(engine, options, rng)
        traces = engine.stop_profile()
        num_tokens = options.bs * options.random_output_len
        print(f"{num_tokens} tokens in {seconds:.3f} s, while recorded: {num_tokens / seconds:.1f} tokens/s")
        if engine_options.speculative is not None:
            engine.print_mtp_statistics()
    return traces


def _run(engine: LLMEngine, options: argparse.Namespace, rng: random.Random) -> float:
    """Seconds that the workload took, with prompts of its own."""
    vocabulary = range(engine.info.vocab_size)
    prompts = [rng.choices(vocabulary, k=options.random_input_len) for _ in range(options.bs)]
    sampling = SamplingParams(temperature=options.temperature, max_tokens=options.random_output_len, ignore_eos=True)
    began_s = time.perf_counter()
    engine.generate(prompts, sampling)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(main())
