"""A whole cluster as a user starts it: `serve run FILE` in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0


class RunningCluster:
    """A cluster that answers at `url`."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def get(self, path: str, *, timeout_s: float = 60.0) -> Any:
        """Decoded JSON of a GET, or the text when it is no JSON."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
            body = response.read().decode()
        return json.loads(body) if response.headers["content-type"].startswith("application/json") else body

    def replicas(self) -> list[dict[str, Any]]:
        """The engines that /v1/cluster shows."""
        replicas: list[dict[str, Any]] = self.get("/v1/cluster")["replicas"]
        return replicas

    def pid_of(self, role: str) -> int:
        """Process of rank 0 of the only replica of a role."""
        (pid,) = [int(replica["pid"]) for replica in self.replicas() if replica["role"] == role]
        return pid

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have these labels."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def is_ready(self) -> bool:
        """Whether /ready says so."""
        try:
            self.get("/ready")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float = 60.0) -> float:
        """Seconds until the condition came true."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > timeout_s:
                raise AssertionError(f"the condition did not come true; the end of the log:\n{tail(self.log)}")
            time.sleep(0.2)
        return time.monotonic() - began_s

    def wait_until_idle(self) -> list[dict[str, int]]:
        """Ledgers of all engines once nothing runs: every block is free or cached, no ticket is open."""

        def is_idle() -> bool:
            statuses = [replica["status"] for replica in self.replicas()]
            return all(
                status is not None
                and status["num_running"] == status["num_waiting"] == status["num_tickets"] == 0
                and not any(count for state, count in status["blocks_by_state"].items() if state not in CALM)
                for status in statuses
            )

        self.wait_until(is_idle)
        return [replica["status"]["blocks_by_state"] for replica in self.replicas()]


CALM = ("free", "cached")
"""States that a block may be in when no request is."""


def tail(log: Path, num_lines: int = 60) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_args(config: Path, target: Path, **args: object) -> Path:
    """A copy of a Serve file with another port and some `args` replaced."""
    document = yaml.safe_load(config.read_text())
    document["http_options"]["port"] = free_port()
    document["applications"][0]["args"].update(args)
    target.write_text(yaml.safe_dump(document))
    return target


@contextmanager
def serve_run(config: Path, directory: Path) -> Iterator[RunningCluster]:
    """`serve run` a file until the block ends; the cluster is ready when the block begins."""
    port = yaml.safe_load(config.read_text())["http_options"]["port"]
    log = directory / "serve.log"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(config)],
            cwd=REPO,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    cluster = RunningCluster(f"http://127.0.0.1:{port}", log)
    try:
        cluster.wait_until(lambda: process.poll() is not None or cluster.is_ready(), timeout_s=START_TIMEOUT_S)
        if process.poll() is not None:
            raise AssertionError(f"`serve run` ended with {process.returncode}:\n{tail(log)}")
        yield cluster
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End `serve run` as Ctrl-C does, and whatever is left of its processes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
