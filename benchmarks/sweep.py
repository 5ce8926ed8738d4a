"""One benchmark at several concurrencies or rates, as one JSON file and one page of plots.

    python -m benchmarks.sweep --over max-concurrency 1 2 4 8 16 --output sweep -- --random-input-len 1024 --ignore-eos

What is behind `--` goes to `benchmarks.serving`. `<output>.json` is written after every run, so a sweep that was
interrupted goes on where it stopped when the same command is given again; `<output>.html` has the plots. At a
concurrency c, `--prompts-per-user` times c requests are sent, unless `--num-prompts` is given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.html_report import write_page
from benchmarks.report import as_table
from benchmarks.result_file import OWN, without_secrets
from benchmarks.serving import measure
from benchmarks.serving_flags import parse_arguments as parse_serving

AXES = {"max-concurrency": int, "request-rate": float}
_DEFAULT_PROMPTS_PER_USER = 10


def main(arguments: Sequence[str]) -> int:
    """Run what is missing. The exit status is 1 if a request failed anywhere, 2 for wrong arguments."""
    args = parse_arguments(arguments)
    path = args.output.with_suffix(".json")
    command = shlex.join([args.axis, *without_secrets(args.serving)])
    try:
        runs = earlier_runs(path, command)
        for value in args.values:
            if _field(args.axis, value) in [_field(args.axis, run[_name(args.axis)]) for run in runs]:
                print(f"== --{args.axis} {value}: there already")
                continue
            print(f"== --{args.axis} {value}", flush=True)
            outcome, result = measure(parse_serving(flags := serving_flags(args, value)), flags)
            print(as_table(outcome.report), flush=True)
            runs = sorted([*runs, result], key=lambda run: float(run[_name(args.axis)]))
            write(path, command, runs)
        print(f"saved {path}, {write_page(runs, args.output.with_suffix('.html'), title=args.title)}")
    except (ValueError, aiohttp.ClientError, TimeoutError) as exc:
        print(f"benchmarks.sweep: {exc}", file=sys.stderr)
        return 2
    return 1 if any(run[OWN]["num_failed"] for run in runs) else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; `axis`, `values` and `serving` are what is behind `--over` and behind `--`."""
    own, _, serving = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--over", nargs="+", required=True, metavar="FLAG VALUE", help=f"one of {list(AXES)}; values")
    parser.add_argument("--output", type=Path, default=Path("sweep"), help="path of both files, without their ends")
    parser.add_argument("--prompts-per-user", type=int, default=_DEFAULT_PROMPTS_PER_USER)
    parser.add_argument("--title", help="of the page")
    args = parser.parse_args(own)
    axis, *values = args.over
    axis = axis.lstrip("-")
    if axis not in AXES or not values:
        parser.error(f"--over takes one of {list(AXES)} and values")
    try:
        args.values = [AXES[axis](value) for value in values]
    except ValueError as exc:
        parser.error(f"--over {axis}: {exc}")
    args.axis, args.serving = axis, serving
    parse_serving(serving_flags(args, args.values[0]))
    return args


def _split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    items = list(arguments)
    if "--" not in items:
        return items, "", []
    at = items.index("--")
    return items[:at], "--", items[at + 1 :]


def serving_flags(args: argparse.Namespace, value: float) -> list[str]:
    """Arguments of one run."""
    flags = [*args.serving, f"--{args.axis}", str(value)]
    is_counted = any(flag.replace("_", "-").startswith("--num-prompts") for flag in args.serving)
    if args.axis == "max-concurrency" and not is_counted:
        flags += ["--num-prompts", str(int(args.prompts_per_user * value))]
    return flags


def earlier_runs(path: Path, command: str) -> list[dict[str, Any]]:
    """Runs of the same command that are there already. Raises ValueError if the file is another sweep's."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("sweep") != command:
        raise ValueError(f"{path} is the result of another sweep: name another --output, or remove it")
    runs: list[dict[str, Any]] = document["runs"]
    return runs


def write(path: Path, command: str, runs: Sequence[dict[str, Any]]) -> None:
    """The sweep's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"sweep": command, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def _name(axis: str) -> str:
    return axis.replace("-", "_")


def _field(axis: str, value: Any) -> float:
    return float(AXES[axis](value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
