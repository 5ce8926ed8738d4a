"""Seconds from the start of a process to its first token, by part: with no compiled kernels at hand, then with them.

    python -m benchmarks.startup --model shape:llama_8b

Each start is a process of its own. The first has an empty cache of compiled kernels, the second finds what the first
one left. `shape:NAME` is a model of dummy weights (benchmarks/shapes.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

from benchmarks.records import save_record

_RESULT = "RESULT "


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start, in seconds."""

    caches: str
    imports_s: float
    """From the start of the process until the engine's modules are there."""
    engine_s: float
    """Until the engine is ready."""
    first_token_s: float
    """From then until the first token of a prompt of 128 tokens."""
    total_s: float
    parts: str
    """Of the engine's start, as it tells them."""

    def __str__(self) -> str:
        return (
            f"{self.caches:5} {self.total_s:6.1f} s: imports {self.imports_s:.1f}, engine {self.engine_s:.1f} "
            f"({self.parts}), first token {self.first_token_s:.2f}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Start twice, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    parser.add_argument("--begun-s", type=float, help=argparse.SUPPRESS)
    args, engine_arguments = parser.parse_known_args(arguments)
    if args.begun_s is not None:
        _start(args.begun_s, engine_arguments)
        return
    starts = []
    with tempfile.TemporaryDirectory() as directory:
        for caches in ("cold", "warm"):
            starts.append(_measure(caches, engine_arguments, directory))
            print(starts[-1], flush=True)
    if args.save:
        model = engine_arguments[engine_arguments.index("--model") + 1].rpartition(":")[2].rpartition("/")[2]
        print(f"saved {save_record('startup', model, {'starts': [asdict(start) for start in starts]})}")


def _measure(caches: str, engine_arguments: list[str], cache_dir: str) -> Start:
    env = {**os.environ, "TRITON_CACHE_DIR": cache_dir}
    command = [sys.executable, "-m", "benchmarks.startup", "--begun-s", str(time.time()), *engine_arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not lines:
        raise RuntimeError(f"the start failed: {done.stderr[-2000:]}")
    return Start(caches=caches, **json.loads(lines[0].removeprefix(_RESULT)))


def _start(begun_s: float, engine_arguments: list[str]) -> None:
    """In the process that is measured."""
    from atom_cluster import SamplingParams
    from benchmarks.offline_throughput import Workload, add_engine_arguments, open_engine
    from benchmarks.shapes import model_dir

    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    args = parser.parse_args(engine_arguments)
    args.workload = [Workload(1, 128, 4096 - 128)]
    imported_s = time.time()
    with open_engine(model_dir(args.model), args) as engine:
        ready_s = time.time()
        engine.generate([list(range(5, 133))], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        answered_s = time.time()
        result = {
            "imports_s": imported_s - begun_s,
            "engine_s": ready_s - imported_s,
            "first_token_s": answered_s - ready_s,
            "total_s": answered_s - begun_s,
            "parts": engine.info.choices["start"],
        }
        print(_RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
