"""Every metric of the cluster, in one table: a module per who records them. `kinds` says how they are recorded."""

from __future__ import annotations

from atom_cluster.observability.metrics import cache, http, processes, requests, routing, steps
from atom_cluster.observability.metrics.cache import *  # noqa: F403 - the table is one, wherever its rows are written
from atom_cluster.observability.metrics.http import *  # noqa: F403
from atom_cluster.observability.metrics.kinds import *  # noqa: F403
from atom_cluster.observability.metrics.kinds import Metric
from atom_cluster.observability.metrics.processes import *  # noqa: F403
from atom_cluster.observability.metrics.requests import *  # noqa: F403
from atom_cluster.observability.metrics.routing import *  # noqa: F403
from atom_cluster.observability.metrics.steps import *  # noqa: F403

SECTIONS: dict[str, tuple[Metric, ...]] = {
    title: tuple(value for value in vars(module).values() if isinstance(value, Metric))
    for title, module in {
        "HTTP requests, by the ingress": http,
        "Requests, by the engine that answers them": requests,
        "Steps, graphs, memory and speculation, by engines": steps,
        "KV cache and KV transfer, by engines": cache,
        "Router": routing,
        "Processes and gangs": processes,
    }.items()
}
"""The table by heading, in the order of the files."""
ALL_METRICS: tuple[Metric, ...] = tuple(metric for metrics in SECTIONS.values() for metric in metrics)
"""The table."""
