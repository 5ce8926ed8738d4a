"""One benchmark at several concurrencies or rates, as one JSON file and one page of plots.

    python -m benchmarks.sweep --over max-concurrency 1 2 4 8 16 --output sweep -- --random-input-len 1024 --ignore-eos

What is behind `--` goes to `benchmarks.serving`. `<output>.json` is written after every run, so a sweep that was
interrupted goes on where it stopped when the same command is given again; `<output>.html` has the plots. At a
concurrency c, `--prompts-per-user` times c requests are sent, unless `--num-prompts` is given. Each run draws its own
prompts, with a seed made of `--seed` and the swept value: what one run has left in a prefix cache helps no other.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.html_report import write_page
from benchmarks.result_file import without_secrets
from benchmarks.serving import measure, status_of, tell
from benchmarks.serving_flags import parse_arguments as parse_serving

AXES = {"max-concurrency": int, "request-rate": float}
_DEFAULT_PROMPTS_PER_USER = 10
_OF_ONE_RUN = ("--save-result", "--result-dir", "--result-filename", "--html")
"""Flags of `benchmarks.serving` that say where one run goes."""


def main(arguments: Sequence[str]) -> int:
    """Run what is missing. The exit status is that of `benchmarks.serving`, of all runs together."""
    args = parse_arguments(arguments)
    path = args.output.with_suffix(".json")
    command = shlex.join([args.axis, f"{args.prompts_per_user} per user", *without_secrets(args.serving)])
    try:
        runs = earlier_runs(path, command)
        for value in args.values:
            if _field(args.axis, value) in [_field(args.axis, run[_name(args.axis)]) for run in runs]:
                print(f"== --{args.axis} {value}: there already")
                continue
            print(f"== --{args.axis} {value}", flush=True)
            serving = parse_serving(flags := serving_flags(args, value))
            outcome, result = measure(serving, flags)
            tell(serving, outcome)
            runs = sorted([*runs, result], key=lambda run: float(run[_name(args.axis)]))
            write(path, command, runs)
        print(f"saved {path}, {write_page(runs, args.output.with_suffix('.html'), title=args.title)}")
    except (ValueError, aiohttp.ClientError, TimeoutError) as exc:
        print(f"benchmarks.sweep: {exc}", file=sys.stderr)
        return 2
    return status_of(runs)


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
    if given := [flag for flag in _OF_ONE_RUN if any(_names(item, flag) for item in serving)]:
        parser.error(f"{given[0]} is for one run: --output names both files of a sweep")
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
    seed = parse_serving(args.serving).seed + zlib.crc32(f"{args.axis} {value:g}".encode())
    flags = [*args.serving, f"--{args.axis}", str(value), "--seed", str(seed)]
    is_counted = any(_names(item, "--num-prompts") for item in args.serving)
    if args.axis == "max-concurrency" and not is_counted:
        flags += ["--num-prompts", str(int(args.prompts_per_user * value))]
    return flags


def _names(item: str, flag: str) -> bool:
    return item.partition("=")[0].replace("_", "-") == flag


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
    """The sweep's file, whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps({"sweep": command, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _name(axis: str) -> str:
    return axis.replace("-", "_")


def _field(axis: str, value: Any) -> float:
    return float(AXES[axis](value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
