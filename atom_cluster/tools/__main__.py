"""The command `atom-cluster`. Parses arguments and prints; the work is in the modules beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atom_cluster import __version__
from atom_cluster.config.env import default_variable
from atom_cluster.errors import AtomClusterError
from atom_cluster.tools.demo_model import demo_model_dir, get_demo_model


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

        print(explain_file(options.file))
    elif options.command == "trace":
        from atom_cluster.tools.trace.summary import analyze_trace

        print(analyze_trace(options.file, options.output))
    elif options.command == "drill":
        if options.config is not None:
            # Ray protects a new cluster so by itself, but who connects to one by its address has to say it. There may
            # be other clusters on this host. Ray reads this when it is imported.
            default_variable("RAY_AUTH_MODE", "token")
        # Needs Ray, which is slow to import.
        from atom_cluster.tools.drill.run import drill

        holds = drill(
            options.scenarios,
            url=options.url,
            config=options.config,
            num_clients=options.clients,
            num_samples=options.samples,
            output=options.output,
            report=_print_now,
        )
        return 0 if holds else 2
    elif options.command == "get-demo-model":
        get_demo_model(demo_model_dir(), replace=options.force, report=_print_now)
    else:
        print(__version__)
    return 0


def _print_now(line: str) -> None:
    # pip writes to the same terminal or log from a process of its own; buffered lines would come after its lines.
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="atom-cluster", description="Tools around an atom_cluster deployment.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check-config", help="check a Serve YAML and print what it comes to on this machine")
    check.add_argument("file", type=Path, metavar="FILE")
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
    drill.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    demo = commands.add_parser("get-demo-model", help="fetch the small model that the quick start serves")
    demo.add_argument("--force", action="store_true", help="make it anew even if it is there")
    commands.add_parser("version", help="print the version")
    return parser


if __name__ == "__main__":
    sys.exit(main())
