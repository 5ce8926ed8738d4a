"""What /v1/cluster and /metrics show. Reads what others know; asks no engine."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterable
from typing import Any

import msgspec
import ray

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.messages.cluster import MemberCard, Membership
from atom_cluster.observability.metrics import ALL_METRICS

_SCRAPE_TIMEOUT_S = 3.0
_RAY_LABELS = re.compile(
    r"(?<=[{,])(?:Component|JobId|NodeAddress|SessionName|Version|WorkerId|otel_scope_\w+)=\"(?:[^\"\\]|\\.)*\",?"
)
"""What Ray adds to every series: long, new with every process, and nothing that `replica` does not tell."""
_RAY_PREFIX = "ray_"
"""Ray puts this before the name of every metric that it exports."""
_METRIC_BY_SAMPLE = {
    f"{_RAY_PREFIX}{metric.name}{suffix}": metric
    for metric in ALL_METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def cluster_page(config: ClusterConfig, reasons: dict[str, str], membership: Membership | None) -> dict[str, Any]:
    """The cluster as this ingress last heard of it; JSON-serializable."""
    members = () if membership is None else membership.members
    return {
        "model": config.model,
        "served_name": config.model_options.served_name,
        "router": None if membership is None else msgspec.to_builtins(membership.router),
        "replicas": [_replica(card) for card in members if card.kind == "engine"],
        "ingresses": [_process(card) for card in members if card.kind == "ingress"],
        "configuration": config.model_dump(mode="json"),
        "reasons": reasons,
    }


def _process(card: MemberCard) -> dict[str, Any]:
    return {"id": card.address.peer_id, "endpoint": card.address.endpoint, "node": card.node, "pid": card.pid}


def _replica(card: MemberCard) -> dict[str, Any]:
    return _process(card) | {
        "role": card.role,
        "epoch": card.address.epoch,
        "is_draining": card.is_draining,
        "fingerprint": card.fingerprint,
        "num_blocks": card.num_blocks,
        "block_size": card.block_size,
        "choices": card.choices,
        "status": None if card.status is None else msgspec.to_builtins(card.status),
    }


async def scrape_metrics() -> str:
    """This project's metrics of all nodes, in Prometheus text format, under the names of the table.

    Every Ray node exports the metrics of its processes on a port of its own; one scrape of the ingress then shows the
    whole cluster to whoever has no service discovery for those. A node that does not answer is left out.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    pages = await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls), return_exceptions=True)
    return merge_pages(page for page in pages if isinstance(page, str))


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_SCRAPE_TIMEOUT_S) as response:
        return str(response.read().decode())


def merge_pages(pages: Iterable[str]) -> str:
    """One page with only our metrics: each family's HELP and TYPE once, samples of all pages after them."""
    samples: dict[str, list[str]] = {}
    for page in pages:
        for line in page.splitlines():
            metric = _METRIC_BY_SAMPLE.get(re.split("[{ ]", line, maxsplit=1)[0])
            if metric is not None:
                samples.setdefault(metric.name, []).append(_sample(line))
    parts: list[str] = []
    for metric in ALL_METRICS:
        if metric.name in samples:
            # Ray knows a histogram's parts only, and calls them gauges.
            parts += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            parts += samples[metric.name]
    return "".join(part + "\n" for part in parts)


def _sample(line: str) -> str:
    return _RAY_LABELS.sub("", line.removeprefix(_RAY_PREFIX)).replace(",}", "}", 1).replace("{}", "", 1)
