"""schemathesis in all its phases against a cluster of its own; afterwards the same processes are there, none grown.

python -m tests.e2e.fuzz [--phases coverage,fuzzing,stateful] [--max-time SECONDS] [--seed NUMBER]

Exits with 1 if an answer was not what `tests/api/page_checks.py` asks for, or the cluster is not what it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from atom_cluster.config.env import default_variable
from atom_cluster.tools.drill.listeners import resident_bytes
from atom_cluster.units import MiB
from tests.api.page_checks import CHECKS
from tests.e2e.cluster import REPO, RunningCluster, serve_run, with_args

MAX_GROWTH_BYTES = 64 * MiB
"""Of one process, after it is warm."""
_MODEL_LEN = 512
_NUM_BLOCKS = 160
"""KV blocks of each engine, of 16 tokens: few, since their memory grows until each of them was written to."""
_DEFAULT_TOKENS = 8
"""Of a request that names no limit: most of what is made up does not, and on CPUs time is short."""


def main() -> int:
    """Start a cluster, fuzz it, say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="coverage,fuzzing,stateful", help="behind that of examples")
    parser.add_argument("--max-time", type=int, default=240, help="seconds for these phases")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atom-fuzz-") as made:
        directory = Path(made)
        with serve_run(_config(directory), directory) as cluster:
            # Whatever is made once, at the first request of its kind, is not growth.
            is_right = _schemathesis(cluster, directory, "--phases=examples", f"--seed={args.seed}")
            _warm_up(cluster)
            before, blocks = _sizes(cluster), _num_blocks(cluster)
            more = (f"--phases={args.phases}", f"--max-time={args.max_time}", f"--seed={args.seed}")
            is_right = _schemathesis(cluster, directory, *more) and is_right
            num_blocks = _num_blocks(cluster)
            after = _sizes(cluster)
            is_ready = cluster.is_ready()
    print(f"blocks free or cached, by engine: before {blocks}, after {num_blocks}; ready: {is_ready}")
    is_whole = _report(before, after) and blocks == num_blocks and is_ready
    return 0 if is_right and is_whole else 1


def _config(directory: Path) -> Path:
    return with_args(
        REPO / "configs" / "smollm2_cpu.yaml",
        directory / "cluster.yaml",
        model_options={"max_model_len": _MODEL_LEN},
        api={
            "default_max_tokens": _DEFAULT_TOKENS,
            "chat_template": str(Path(__file__).with_name("smollm2_tools.jinja")),
        },
        cache={"num_blocks": _NUM_BLOCKS},
        kv_transfer={"conditional_prefill": False},
        observability={"profile": {"directory": str(directory / "traces"), "max_steps": 4}},
    )


def _warm_up(cluster: RunningCluster) -> None:
    """Write to every KV block, by prompts that have none in common. Under a profiler, whose first windows take 200 MiB
    that later ones use again (measured, as is that `malloc_trim` would give them back).
    """
    model = cluster.get("/v1/models")["data"][0]["id"]
    for number in range(2 * _NUM_BLOCKS * 16 // _MODEL_LEN):
        httpx.post(f"{cluster.url}/start_profile", timeout=60)  # one may be open already
        body = {"model": model, "prompt": [100 + number] * (_MODEL_LEN - 4), "max_tokens": 4, "ignore_eos": True}
        httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120).raise_for_status()
        httpx.post(f"{cluster.url}/stop_profile", timeout=60).raise_for_status()


def _schemathesis(cluster: RunningCluster, directory: Path, *arguments: str) -> bool:
    """One run of its command line. In a directory of its own, where it keeps what it has learned."""
    config = directory / "schemathesis.toml"
    config.write_text('hooks = "tests.api.page_checks"\n')
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run"]
    checks = ",".join(check.__name__ for check in CHECKS)
    options = ("--workers=4", "--request-timeout=120", "--continue-on-failure", "--suppress-health-check=all")
    print(f"schemathesis run {' '.join(arguments)}", flush=True)
    return (
        subprocess.run(
            [*command, f"{cluster.url}/openapi.json", f"--checks={checks}", *options, *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        ).returncode
        == 0
    )


def _sizes(cluster: RunningCluster) -> dict[tuple[str, int], int]:
    """Resident bytes by role and process."""
    page = cluster.page()
    members = [(replica["role"], int(replica["pid"])) for replica in page["replicas"]]
    members += [("ingress", int(ingress["pid"])) for ingress in page["ingresses"]]
    members += [("router", pid) for pid in _router_pids(cluster)]
    return {(role, pid): resident_bytes(pid) for role, pid in members}


def _router_pids(cluster: RunningCluster) -> list[int]:
    # Ray reads when it is imported how to prove who it is.
    default_variable("RAY_AUTH_MODE", "token")
    from atom_cluster.tools.drill.processes import Processes

    processes = Processes(cluster.ray_address)
    try:
        return [process.pid for process in processes.of_deployment("Router")]
    finally:
        Processes.disconnect()


def _num_blocks(cluster: RunningCluster) -> list[int]:
    """Blocks of each engine once all of them are free or cached."""
    return sorted(sum(ledger.values()) for ledger in cluster.wait_until_idle())


def _report(before: dict[tuple[str, int], int], after: dict[tuple[str, int], int]) -> bool:
    """A line per process; whether they are the same ones, and none has grown."""
    for role, pid in sorted(before | after):
        was, became = before.get((role, pid)), after.get((role, pid))
        text = " -> ".join("none" if size is None else f"{size / MiB:.0f} MiB" for size in (was, became))
        print(f"{role:8} {pid:8}  {text}")
    if before.keys() != after.keys():
        print("processes have ended")
        return False
    return all(after[member] - before[member] < MAX_GROWTH_BYTES for member in before)


if __name__ == "__main__":
    sys.exit(main())
