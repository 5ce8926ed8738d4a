"""Looks at a running cluster as the dashboard would: a real Prometheus, some load, and every panel's query.

    python -m atom_cluster.tools.dashboard_check http://127.0.0.1:8000

Starts `prometheus` on loopback with a directory of its own, for as long as it takes. Every panel must get data, but for
those that count what need not happen; of those the queries must be valid. With `--ray-discovery`, Prometheus collects
from Ray's own ports instead of /metrics, with the relabelling of `kubernetes/monitoring/podmonitor.yaml`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atom_cluster.errors import AtomClusterError
from atom_cluster.tools.dashboard_panels import Panel, rows
from atom_cluster.tools.drill.cluster import free_port

SCRAPE_S = 5
RATE_WINDOW = "1m"
"""What `$__rate_interval` stands for here."""
_MONITORING = Path(__file__).resolve().parents[2] / "kubernetes" / "monitoring"
_START_S = 20.0
_VARIABLES = {"$__rate_interval": RATE_WINDOW, "$role": ".*", "$replica": ".*", "$route": ".*"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One query of one panel."""

    row: str
    panel: Panel
    expr: str
    num_series: int
    error: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the panel would not show what it should."""
        return bool(self.error) or (not self.num_series and not self.panel.is_quiet)


def substituted(expr: str, variables: Mapping[str, str] = _VARIABLES) -> str:
    """A query of the dashboard as Prometheus gets it."""
    for name, value in variables.items():
        expr = expr.replace(name, value)
    return expr


class Prometheus:
    """A Prometheus server's HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query. Raises `AtomClusterError` for what Prometheus says of a bad one."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as exc:
            raise AtomClusterError(json.load(exc).get("error", str(exc))) from exc
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2):
                return True
        except OSError:
            return False


def check_panels(prometheus: Prometheus) -> list[Finding]:
    """Every query, and what came back."""
    findings = []
    for row, panels in rows().items():
        for panel in panels:
            for query in panel.queries:
                expr = substituted(query.expr)
                try:
                    series = [found for found in prometheus.query(expr) if found["value"][1] != "NaN"]
                    findings.append(Finding(row, panel, expr, len(series)))
                except AtomClusterError as exc:
                    findings.append(Finding(row, panel, expr, 0, str(exc)))
    return findings


@contextmanager
def running_prometheus(scrape: Mapping[str, Any]) -> Iterator[Prometheus]:
    """A Prometheus with one job and our rules, until the block ends."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise AtomClusterError("there is no `prometheus` here")
    with tempfile.TemporaryDirectory(prefix="dashboard-check-") as name:
        directory = Path(name)
        rules = yaml.safe_load((_MONITORING / "rules.yaml").read_text())["spec"]
        (directory / "rules.yml").write_text(yaml.safe_dump(rules))
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(directory / "rules.yml")],
            "scrape_configs": [{"job_name": "atom_cluster", **scrape}],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        arguments = [
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]
        process = subprocess.Popen([binary, *arguments])
        try:
            prometheus = Prometheus(f"http://{address}")
            deadline_s = time.monotonic() + _START_S
            while not prometheus.is_ready():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise AtomClusterError("prometheus did not start")
                time.sleep(0.2)
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=20)


def scrape_of_api(url: str) -> dict[str, Any]:
    """Collect from /metrics of the API."""
    parts = urllib.parse.urlsplit(url)
    return {"scheme": parts.scheme, "static_configs": [{"targets": [parts.netloc]}]}


def scrape_of_ray(discovery: Path) -> dict[str, Any]:
    """Collect from the ports that Ray lists, as the PodMonitor does."""
    monitor = yaml.safe_load((_MONITORING / "podmonitor.yaml").read_text())
    relabelings = monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    relabel_configs = [{names.get(key, key): value for key, value in entry.items()} for entry in relabelings]
    return {"file_sd_configs": [{"files": [str(discovery)]}], "metric_relabel_configs": relabel_configs}


class Load(threading.Thread):
    """A few clients of a cluster, until `stop`: prompts with a common beginning, streamed or not, and one that errs."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name=f"load-{seed}", daemon=True)
        self._url = url
        self._seed = seed
        self._is_over = threading.Event()
        self.num_answers = 0
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
            self._model = json.load(response)["data"][0]["id"]

    def run(self) -> None:
        """Ask one after another."""
        number = 0
        while not self._is_over.is_set():
            number += 1
            words = " ".join(f"{self._seed}-{number}-{index}" for index in range(20))
            prompt = "The quick brown fox jumps over the lazy dog. " * 12 + words
            body = {"model": self._model, "prompt": prompt, "max_tokens": 24, "stream": number % 2 == 0}
            if number % 10 == 0:
                body["max_tokens"] = -1
            self._post(body)

    def stop(self) -> None:
        """End after the answer under way."""
        self._is_over.set()
        self.join(timeout=60)

    def _post(self, body: Mapping[str, object]) -> None:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._url}/v1/completions", data, headers={"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
            self.num_answers += 1
        except urllib.error.HTTPError as exc:
            exc.close()


def report(findings: Sequence[Finding]) -> int:
    """Print what was found; how many panels would be wrong."""
    for finding in findings:
        word = "BAD" if finding.is_bad else "ok" if finding.num_series else "quiet"
        print(f"{word:5} {finding.num_series:3} series  {finding.row} / {finding.panel.title}")
        if finding.is_bad:
            print(f"      {finding.expr}\n      {finding.error}")
    return sum(finding.is_bad for finding in findings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 if a panel gets no data that should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the cluster's API")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to put load on it")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--ray-discovery", type=Path, help="Ray's prom_metrics_service_discovery.json")
    args = parser.parse_args(arguments)
    scrape = scrape_of_api(args.url) if args.ray_discovery is None else scrape_of_ray(args.ray_discovery)
    with running_prometheus(scrape) as prometheus:
        loads = [Load(args.url.rstrip("/"), seed) for seed in range(args.clients)]
        for load in loads:
            load.start()
        time.sleep(args.seconds)
        findings = check_panels(prometheus)
        for load in loads:
            load.stop()
    num_bad = report(findings)
    print(f"{len(findings)} queries, {num_bad} bad; {sum(load.num_answers for load in loads)} requests answered")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
