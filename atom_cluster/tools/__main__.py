"""The command `atom-cluster`. Parses arguments and prints; the work is in the modules beside it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from atom_cluster import __version__
from atom_cluster.config.env import default_variable
from atom_cluster.config.protection import RateLimits, Role
from atom_cluster.errors import AtomClusterError, ConfigError
from atom_cluster.tools.demo_model import demo_model_dir, get_demo_model
from atom_cluster.tools.make_key import new_key


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with `arguments`, or those of the process.

    Returns the exit status: 1 for an error it printed, 2 for a drill in which a promise was broken.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except AtomClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.command == "check-config":
        # Looks at the hardware through torch, which is slow to import.
        from atom_cluster.tools.check_config import explain_file

        print(explain_file(options.file, accelerator=options.accelerator, model_config=options.model_config))
    elif options.command == "trace":
        from atom_cluster.tools.trace.summary import analyze_trace

        print(analyze_trace(options.file, options.output))
    elif options.command == "drill":
        if options.config is not None:
            # Ray protects a new cluster so by itself, but who connects to one by its address has to say it. There may
            # be other clusters on this host. Ray reads this when it is imported.
            default_variable("RAY_AUTH_MODE", "token")
        # As Ctrl-C: clusters that it has started would be left behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Needs Ray, which is slow to import.
        from atom_cluster.tools.drill.run import drill

        holds = drill(
            options.scenarios,
            url=options.url,
            config=options.config,
            api_key=None if options.api_key_file is None else _first_word(options.api_key_file),
            num_clients=options.clients,
            num_samples=options.samples,
            output=options.output,
            report=_print_now,
        )
        return 0 if holds else 2
    elif options.command == "make-key":
        limits = RateLimits(
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            concurrent_requests=options.concurrent_requests,
        )
        key, line = new_key(
            options.name, role=options.role, limits=limits, most_urgent_priority=options.most_urgent_priority
        )
        print(f"the key, which is not kept anywhere: {key}\nits line in the file of keys:\n{line}")
    elif options.command == "get-demo-model":
        get_demo_model(demo_model_dir(), replace=options.force, report=_print_now)
    else:
        print(__version__)
    return 0


def _print_now(line: str) -> None:
    # pip writes to the same terminal or log from a process of its own; buffered lines would come after its lines.
    print(line, flush=True)


def _first_word(path: Path) -> str:
    try:
        return path.read_text().split()[0]
    except (OSError, IndexError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: no API key in it") from exc


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="atom-cluster", description="Tools around an atom_cluster deployment.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check-config", help="check a Serve YAML and print what it comes to, memory included")
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument("--accelerator", metavar="NAME", help="MI300X, MI355X or H200; default: what this machine has")
    check.add_argument("--model-config", type=Path, metavar="FILE", help="config.json of a model that is not here")
    trace = commands.add_parser("trace", help="what the steps of a profiler trace were spent on: tables and pictures")
    trace.add_argument("file", type=Path, metavar="TRACE", help="a trace that a rank has written, .json or .gz")
    trace.add_argument("--output", type=Path, metavar="DIR", help="directory for the files; default: beside the trace")
    drill = commands.add_parser("drill", help="faults on purpose, under load: are the promises of reliability kept?")
    drill.add_argument("scenarios", nargs="+", metavar="SCENARIO", help="by name, `cancel`, or `all`")
    where = drill.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a cluster that runs on the Ray cluster of this host")
    where.add_argument("--config", type=Path, metavar="FILE", help="Serve YAML of a cluster to start for each group")
    drill.add_argument("--clients", type=int, default=100, help="that ask at the same time")
    drill.add_argument("--samples", type=int, default=50, help="of `cancel`, for each phase, streaming and not")
    key_help = "file with an admin's API key, where the cluster wants one"
    drill.add_argument("--api-key-file", type=Path, metavar="FILE", help=key_help)
    drill.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    key = commands.add_parser("make-key", help="make an API key, and its line for the file of keys")
    key.add_argument("name", metavar="NAME", help="in logs and metrics instead of the key")
    key.add_argument("--role", choices=get_args(Role), default="user", help="what it may do; default: %(default)s")
    for limit in RateLimits.model_fields:
        key.add_argument(f"--{limit.replace('_', '-')}", type=_positive, metavar="N", help="limit of its own")
    key.add_argument("--most-urgent-priority", type=int, metavar="N", help="lowest it may ask for; lower runs first")
    demo = commands.add_parser("get-demo-model", help="fetch the small model that the quick start serves")
    demo.add_argument("--force", action="store_true", help="make it anew even if it is there")
    commands.add_parser("version", help="print the version")
    return parser


if __name__ == "__main__":
    sys.exit(main())
