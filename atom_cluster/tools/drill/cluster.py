"""A cluster as its clients see it, and `serve run FILE` in a process of its own. Knows no faults and no load."""

from __future__ import annotations

import contextlib
import json
import os
import re
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

from atom_cluster.config.env import default_variable
from atom_cluster.errors import AtomClusterError

START_TIMEOUT_S = 180.0
CALM = ("free", "cached")
"""States that a block may be in when no request is."""
_POLL_S = 0.2


class DrillError(AtomClusterError):
    """The cluster does not do what the drill waits for."""

    code = "drill_failed"


class RunningCluster:
    """A cluster that answers at `url`."""

    def __init__(
        self, url: str, log: Path | None = None, *, ray_address: str = "auto", api_key: str | None = None
    ) -> None:
        """log: what `serve run` writes to, shown when something goes wrong. ray_address: of its Ray cluster. api_key:
        an admin's, where the cluster wants one."""
        self.url = url.rstrip("/")
        self.log = log
        self.ray_address = ray_address
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        """Of every request to it."""

    def get(self, path: str, *, timeout_s: float = 60.0) -> Any:
        """Decoded JSON of a GET, or the text when it is no JSON. Raises OSError when there is no answer."""
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=self.headers), timeout=timeout_s
        ) as response:
            body = response.read().decode()
        return json.loads(body) if response.headers["content-type"].startswith("application/json") else body

    def page(self) -> dict[str, Any]:
        """/v1/cluster; waits while the cluster does not answer."""
        found: list[dict[str, Any]] = []

        def asks() -> bool:
            try:
                found.append(self.get("/v1/cluster", timeout_s=5.0))
            except OSError:
                return False
            return True

        self.wait_until(asks, what="/v1/cluster answers", timeout_s=120.0)
        return found[-1]

    def replicas(self) -> list[dict[str, Any]]:
        """The engines that /v1/cluster shows."""
        replicas: list[dict[str, Any]] = self.page()["replicas"]
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
            self.get("/ready", timeout_s=35.0)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def wait_until(
        self, condition: Callable[[], bool], *, what: str = "the condition came true", timeout_s: float = 60.0
    ) -> float:
        """Seconds until the condition was true. Raises `DrillError` that shows the end of the log."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > timeout_s:
                end = "" if self.log is None else f"; the end of the log:\n{tail(self.log)}"
                raise DrillError(f"not within {timeout_s:.0f} s: {what}{end}")
            time.sleep(_POLL_S)
        return time.monotonic() - began_s

    def wait_until_idle(self, *, timeout_s: float = 60.0) -> list[dict[str, int]]:
        """Ledgers of all engines once nothing runs: every block is free or cached, no ticket is open."""
        self.wait_until(lambda: self.num_held() == 0, what="no block is held and no ticket open", timeout_s=timeout_s)
        return [replica["status"]["blocks_by_state"] for replica in self.replicas()]

    def num_held(self) -> int:
        """Blocks that are neither free nor cached, requests, and tickets, over all engines."""
        total = 0
        for replica in self.replicas():
            status = replica["status"]
            if status is None:
                return 1
            total += status["num_running"] + status["num_waiting"] + status["num_tickets"]
            for pages in (status["blocks_by_state"], *status["other_pages_by_state"].values()):
                total += sum(count for state, count in pages.items() if state not in CALM)
        return total


def tail(log: Path, num_lines: int = 60) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_args(config: Path, target: Path, **args: object) -> Path:
    """A copy of a Serve file with another port and some `args` replaced; of mappings, the keys given."""
    document = yaml.safe_load(config.read_text())
    document["http_options"]["port"] = free_port()
    settings = document["applications"][0]["args"]
    for name, value in args.items():
        before = settings.get(name)
        settings[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    target.write_text(yaml.safe_dump(document))
    return target


@contextmanager
def serve_run(
    config: Path, directory: Path, *, working_dir: Path | None = None, api_key: str | None = None
) -> Iterator[RunningCluster]:
    """`serve run` a file until the block ends; the cluster is ready, with all its roles, when the block begins.

    working_dir: where `deployments/` is; None: here. api_key: an admin's, where the file asks for one.
    """
    document = yaml.safe_load(config.read_text())
    port, args = document["http_options"]["port"], document["applications"][0]["args"]
    roles = {role for role in ("prefill", "decode", "unified") if role in args}
    log = directory / "serve.log"
    default_variable("RAY_USAGE_STATS_ENABLED", "0")
    # Lines that look alike would come as one, with a count.
    default_variable("RAY_DEDUP_LOGS", "0")
    with log.open("w") as output, children_hear_sigint():
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(config)],
            cwd=working_dir,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = RunningCluster(f"http://127.0.0.1:{port}", log, api_key=api_key)
    try:
        cluster.wait_until(
            lambda: process.poll() is not None or cluster.is_ready(), what="/ready", timeout_s=START_TIMEOUT_S
        )
        if process.poll() is not None:
            raise DrillError(f"`serve run` ended with {process.returncode}:\n{tail(log)}")
        # Ready means that requests are answered, which decode can do alone.
        cluster.wait_until(
            lambda: {replica["role"] for replica in cluster.replicas()} == roles, what=f"replicas of {sorted(roles)}"
        )
        cluster.ray_address = ray_address_of(process.pid)
        yield cluster
    finally:
        stop(process)


@contextmanager
def children_hear_sigint() -> Iterator[None]:
    """Processes started in this block can be ended as `stop` does. Shells have jobs in the background ignore SIGINT,
    and so would these. To be entered on the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        # A handler of Python's is none for the program that a child becomes.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def ray_address_of(pid: int) -> str:
    """Of the Ray cluster that a process has started: there may be others on this host. `auto` if it started none."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            found = re.search(rb"--gcs-address=([^\0]+)", (directory / "cmdline").read_bytes())
            if found and parent_of(directory) == pid:
                return found[1].decode()
    return "auto"


def parent_of(directory: Path) -> int:
    """Of a process by its directory in /proc. Raises OSError when it is gone."""
    return int((directory / "stat").read_text().rpartition(")")[2].split()[1])


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
