"""Runs benchmarks one after the other, each in a process of its own, and saves what they measure.

    python -m benchmarks.run_suite benchmarks/suites/one_h200.txt

A suite has one benchmark per line, with its arguments; lines that begin with # say what it is for. What a benchmark
prints about its results is shown; one that fails or takes too long does not keep the others from running. Benchmarks
save their own results, but for those of single ops (`ops.NAME`): of these the tables that they print are saved here.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import save_record


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: how many benchmarks failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--only", default="", help="lines that have this in them")
    parser.add_argument("--limit-s", type=float, default=300.0, help="longest that one benchmark may take")
    args = parser.parse_args(arguments)
    lines = [line for line in args.suite.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    num_failed = 0
    for line in lines:
        if args.only in line:
            print(f"== {line}", flush=True)
            num_failed += not run(line, args.limit_s)
    return num_failed


def run(line: str, limit_s: float) -> bool:
    """Whether a benchmark ended well."""
    name, *options = shlex.split(line)
    started_s = time.perf_counter()
    is_table = name.startswith("ops.")
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *([] if is_table else ["--save"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"   took longer than {limit_s:.0f} s", flush=True)
        return False
    print("\n".join(f"   {text}" for text in done.stdout.splitlines()[-24:]))
    if is_table and not done.returncode:
        import torch  # noqa: F401  what a record says of GPUs it has from torch

        label = "_".join(option.lstrip("-") for option in options)
        print(f"   saved {save_record(name, label, {'table': done.stdout.splitlines()}, arguments=options)}")
    if done.returncode:
        print("\n".join(f"   {text}" for text in done.stderr.splitlines()[-12:]))
    print(f"   [{time.perf_counter() - started_s:.0f} s]", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
