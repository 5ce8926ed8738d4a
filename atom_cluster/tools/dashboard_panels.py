"""What the Grafana dashboard shows, as panels with queries. `dashboard.py` writes it.

Every query names a metric by its constant, so a dashboard cannot ask for what is not recorded. Names are those of the
table: Prometheus has them from /metrics of the API, or from Ray's own ports by the relabelling of
`kubernetes/monitoring/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atom_cluster.observability import metrics as m
from atom_cluster.observability.metrics import SECTIONS
from atom_cluster.observability.metrics.kinds import Metric

Unit = Literal["short", "reqps", "s", "percentunit", "bytes", "Bps", "none"]
WINDOW = "$__rate_interval"
_FRONT = frozenset(metric.name for metric in (*SECTIONS["HTTP requests, by the ingress"], *SECTIONS["Router"]))
"""Of ingresses and the router, whatever role is looked at."""


@dataclass(frozen=True, slots=True)
class Query:
    """One line, or family of lines, of a panel."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `is_quiet`: nothing to show is normal, since it counts what should not or need not happen."""

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    width: int = 8
    kind: Literal["timeseries", "stat"] = "timeseries"
    is_quiet: bool = False
    is_stacked: bool = False


def selector(metric: Metric, *, suffix: str = "", role: str | None = None, **matchers: str) -> str:
    """A metric's series of the chosen replicas; `role` fixes whose they are, matchers are regular expressions."""
    parts = [] if metric.name in _FRONT else [f'role=~"{role or "$role"}"', 'replica=~"$replica"']
    if "route" in metric.labels:
        parts.append('route=~"$route"')
    for label, pattern in matchers.items():
        if label not in metric.labels:
            raise ValueError(f"{metric.name} has no label {label}")
        parts.append(f'{label}=~"{pattern}"')
    return f"{metric.name}{suffix}{{{','.join(parts)}}}" if parts else f"{metric.name}{suffix}"


def rate(metric: Metric, by: str = "", *, suffix: str = "", role: str | None = None, **matchers: str) -> str:
    """Per second, summed but for the labels in `by`."""
    series = selector(metric, suffix=suffix, role=role, **matchers)
    return f"sum by ({by}) (rate({series}[{WINDOW}]))" if by else f"sum(rate({series}[{WINDOW}]))"


def total(metric: Metric, by: str, *, role: str | None = None, **matchers: str) -> str:
    """A gauge, summed but for the labels in `by`."""
    return f"sum by ({by}) ({selector(metric, role=role, **matchers)})"


def quantiles(metric: Metric, *levels: float, by: str = "", role: str | None = None, **matchers: str) -> list[Query]:
    """Quantiles of a histogram."""
    labels = f"le, {by}" if by else "le"
    buckets = rate(metric, labels, suffix="_bucket", role=role, **matchers)
    legend = f" {{{{{by}}}}}" if by else ""
    return [Query(f"histogram_quantile({level}, {buckets})", f"p{level * 100:g}{legend}") for level in levels]


def mean(metric: Metric, by: str, *, role: str | None = None, **matchers: str) -> str:
    """Mean of a histogram."""
    numbers = (rate(metric, by, suffix=suffix, role=role, **matchers) for suffix in ("_sum", "_count"))
    return " / ".join(numbers)


def one(expr: str, legend: str) -> tuple[Query, ...]:
    """A panel's only query."""
    return (Query(expr, legend),)


def _requests() -> list[Panel]:
    errors = rate(m.HTTP_REQUESTS, status="5..")
    return [
        Panel("Requests", "Answered per second.", "reqps", one(rate(m.HTTP_REQUESTS), "all"), 4, "stat"),
        Panel(
            "Failed",
            "Share of answers with a status of 5xx.",
            "percentunit",
            one(f"({errors} or vector(0)) / {rate(m.HTTP_REQUESTS)}", "5xx"),
            4,
            "stat",
        ),
        Panel("First token, p95", "At the ingress.", "s", tuple(quantiles(m.HTTP_TTFT_S, 0.95)), 4, "stat"),
        Panel("Per output token, p95", "At the ingress.", "s", tuple(quantiles(m.HTTP_TPOT_S, 0.95)), 4, "stat"),
        Panel(
            "Tokens written",
            "Output tokens per second.",
            "short",
            one(rate(m.GENERATION_TOKENS), "tokens/s"),
            4,
            "stat",
        ),
        Panel("Open", "Requests being answered.", "short", one(total(m.HTTP_REQUESTS_OPEN, "role"), "open"), 4, "stat"),
        Panel(
            "Answers by route and status",
            "4xx: clients err. 503: queues are full, or nobody can serve.",
            "reqps",
            one(rate(m.HTTP_REQUESTS, "route, status"), "{{route}} {{status}}"),
        ),
        Panel(
            "Time to first token",
            "From a request's arrival at the ingress to its first token being written.",
            "s",
            tuple(quantiles(m.HTTP_TTFT_S, 0.5, 0.95, 0.99)),
        ),
        Panel(
            "Between tokens",
            "Of streams, from one write to the next.",
            "s",
            tuple(quantiles(m.HTTP_ITL_S, 0.5, 0.95, 0.99)),
        ),
        Panel(
            "Where a first token's time goes",
            "Means. Ingress: tokenizing, routing, the link. Queue: until scheduled or handed to prefill. Grammar: only "
            "of those that waited for one.",
            "s",
            (
                Query(f"{mean(m.HTTP_TTFT_S, 'role')}", "at the ingress"),
                Query(f"{mean(m.TTFT_S, 'role')}", "at the {{role}} engine"),
                Query(f"{mean(m.QUEUE_S, 'role')}", "in the queue of {{role}}"),
                Query(f"{mean(m.GRAMMAR_WAIT_S, 'role')}", "for a grammar that is new to {{role}}"),
            ),
        ),
        Panel(
            "Waiting requests",
            "By engine and reason.",
            "short",
            one(total(m.REQUESTS_WAITING, "replica, reason"), "{{replica}} {{reason}}"),
            is_stacked=True,
        ),
        Panel(
            "Length of prompts and answers",
            "Means per request.",
            "short",
            (
                Query(mean(m.HTTP_PROMPT_TOKENS, "route"), "prompt {{route}}"),
                Query(mean(m.HTTP_OUTPUT_TOKENS, "route"), "answer {{route}}"),
            ),
        ),
    ]


def _side(role: str, kinds: str) -> list[Panel]:
    """Panels of the engines that prefill, or that decode; engines that do both are in each."""
    roles = f"{role}|unified"
    device_wait = rate(m.DEVICE_WAIT_S, "replica", role=roles)
    step_time = rate(m.STEP_S, "replica", suffix="_sum", role=roles)
    return [
        Panel(
            "Tokens per second",
            "Computed by steps.",
            "short",
            one(rate(m.STEP_TOKENS, "replica", suffix="_sum", role=roles), "{{replica}}"),
        ),
        Panel(
            "Time of a step",
            "p50 and p95 by kind.",
            "s",
            tuple(quantiles(m.STEP_S, 0.5, 0.95, by="kind", role=roles, kind=kinds)),
        ),
        Panel(
            "Tokens of a step",
            "Mean by kind.",
            "short",
            one(mean(m.STEP_TOKENS, "replica, kind", role=roles, kind=kinds), "{{replica}} {{kind}}"),
        ),
        Panel(
            "Running requests",
            "Requests with a row.",
            "short",
            one(total(m.REQUESTS_RUNNING, "replica", role=roles), "{{replica}}"),
        ),
        Panel(
            "Prompt tokens that wait",
            "Not computed yet.",
            "short",
            one(total(m.WAITING_TOKENS, "replica", role=roles), "{{replica}}"),
        ),
        Panel(
            "Device waits for the host",
            "Share of step time.",
            "percentunit",
            one(f"{device_wait} / {step_time}", "{{replica}}"),
        ),
    ]


def _transfer() -> list[Panel]:
    return [
        Panel(
            "KV read",
            "By decode, by transport.",
            "Bps",
            one(rate(m.KV_TRANSFER_BYTES, "replica, transport"), "{{replica}} {{transport}}"),
        ),
        Panel(
            "Reads by outcome",
            "Damaged blocks are computed again; after a failed read the prompt is.",
            "short",
            one(rate(m.KV_READS, "transport, outcome"), "{{transport}} {{outcome}}"),
        ),
        Panel(
            "What no computing hides",
            "p95 of publishing (prefill) and of reading behind the last publication (decode).",
            "s",
            (
                *quantiles(m.KV_PUBLISH_S, 0.95, by="replica"),
                *quantiles(m.KV_EXPOSED_S, 0.95, by="replica"),
            ),
        ),
        Panel(
            "Tickets",
            "Handoffs under way, by state.",
            "short",
            one(total(m.TICKETS_OPEN, "role, state"), "{{role}} {{state}}"),
            is_stacked=True,
        ),
        Panel(
            "Handoffs that failed",
            "Their prompts were computed where they decode.",
            "short",
            one(rate(m.KV_TRANSFER_FAILURES, "replica, reason"), "{{replica}} {{reason}}"),
            is_quiet=True,
        ),
        Panel(
            "Bad blocks, leases that ran out",
            "Both should be none.",
            "short",
            (
                Query(rate(m.KV_BAD_BLOCKS, "replica"), "bad blocks {{replica}}"),
                Query(rate(m.KV_LEASE_EXPIRIES, "replica"), "leases {{replica}}"),
            ),
            is_quiet=True,
        ),
    ]


def _cache() -> list[Panel]:
    return [
        Panel(
            "KV blocks",
            "By state; they add up to all blocks.",
            "short",
            one(total(m.KV_BLOCKS, "role, state"), "{{role}} {{state}}"),
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens found in caches",
            "What the router expected, and what engines found.",
            "percentunit",
            (
                Query(f"{rate(m.ROUTER_EXPECTED_HITS)} / {rate(m.ROUTER_PROMPT_TOKENS)}", "expected by the router"),
                Query(f"{rate(m.PREFIX_CACHE_HITS)} / {rate(m.PREFIX_CACHE_QUERIES)}", "found"),
            ),
        ),
        Panel(
            "Findable blocks",
            "Blocks with a known prefix.",
            "short",
            one(total(m.PREFIX_CACHE_BLOCKS, "replica"), "{{replica}}"),
        ),
        Panel(
            "Evicted blocks",
            "Per second.",
            "short",
            one(rate(m.PREFIX_CACHE_EVICTIONS, "replica"), "{{replica}}"),
            12,
            is_quiet=True,
        ),
        Panel(
            "Preemptions",
            "Requests that gave up their blocks, by cause.",
            "short",
            one(rate(m.PREEMPTIONS, "replica, cause"), "{{replica}} {{cause}}"),
            12,
            is_quiet=True,
        ),
    ]


def _router() -> list[Panel]:
    return [
        Panel("Decisions", "By reason.", "reqps", one(rate(m.ROUTER_DECISIONS, "reason"), "{{reason}}")),
        Panel("Where prompts are computed", "And why.", "reqps", one(rate(m.ROUTER_PLACES, "place"), "{{place}}")),
        Panel("Time of a decision", "As ingresses see it.", "s", tuple(quantiles(m.ROUTER_QUERY_S, 0.5, 0.99))),
        Panel("Members", "Heard from recently.", "short", one(total(m.ROUTER_MEMBERS, "kind"), "{{kind}}")),
        Panel(
            "Imbalance",
            "Busiest replica of a group over its mean; 1 is balance.",
            "short",
            one(f"max by (group) ({selector(m.ROUTER_IMBALANCE)})", "{{group}}"),
        ),
        Panel(
            "Members that came and went",
            "In the last ten minutes.",
            "short",
            one(f"sum by (kind, change) (increase({selector(m.ROUTER_MEMBER_CHANGES)}[10m]))", "{{kind}} {{change}}"),
        ),
    ]


def _runner() -> list[Panel]:
    accepted, drafted = (rate(metric, "position") for metric in (m.SPEC_ACCEPTED_TOKENS, m.SPEC_DRAFT_TOKENS))
    return [
        Panel(
            "Steps by how they were run",
            "Graphs are for GPUs.",
            "short",
            one(rate(m.STEPS, "role, execution"), "{{role}} {{execution}}"),
        ),
        Panel(
            "Drafts that came true",
            "By position. Empty without speculation.",
            "percentunit",
            one(f"{accepted} / {drafted}", "draft {{position}}"),
            is_quiet=True,
        ),
        Panel(
            "Tokens per step with drafts",
            "Mean.",
            "short",
            one(mean(m.SPEC_ACCEPTED_LENGTH, "replica"), "{{replica}}"),
            is_quiet=True,
        ),
        Panel(
            "Memory of rank 0",
            "By use.",
            "bytes",
            one(total(m.MEMORY_BYTES, "replica, use"), "{{replica}} {{use}}"),
            is_stacked=True,
        ),
        Panel(
            "Captured sizes",
            "Of steps.",
            "short",
            one(total(m.GRAPHS_CAPTURED, "replica, kind"), "{{replica}} {{kind}}"),
        ),
        Panel(
            "Kernels compiled by steps",
            "All their rows waited for that.",
            "short",
            one(rate(m.KERNELS_COMPILED, "replica"), "{{replica}}"),
            is_quiet=True,
        ),
        Panel("Start", "Seconds by part.", "s", one(total(m.START_S, "replica, part"), "{{replica}} {{part}}")),
    ]


def _health() -> list[Panel]:
    return [
        Panel(
            "Errors of the API",
            "By kind. `internal` is a bug.",
            "reqps",
            one(rate(m.HTTP_ERRORS, "kind"), "{{kind}}"),
        ),
        Panel(
            "Errors of engines",
            "By kind.",
            "reqps",
            one(rate(m.REQUEST_ERRORS, "role, kind"), "{{role}} {{kind}}"),
            is_quiet=True,
        ),
        Panel(
            "Requests that went on elsewhere",
            "Moved by an engine that drains, or replayed since it was lost.",
            "reqps",
            (
                Query(rate(m.REQUESTS_MOVED, "replica"), "moved {{replica}}"),
                Query(rate(m.REQUESTS_REPLAYED), "replayed"),
            ),
            is_quiet=True,
        ),
        Panel("Gangs that are well", "1, or 0.", "short", one(total(m.GANG_HEALTHY, "replica"), "{{replica}}")),
        Panel(
            "Failed checks of gangs",
            "A rank was dead, stuck or silent.",
            "short",
            one(rate(m.GANG_FAILED_CHECKS, "replica"), "{{replica}}"),
            is_quiet=True,
        ),
        Panel(
            "Resident memory",
            "By process.",
            "bytes",
            one(total(m.PROCESS_RESIDENT, "role, replica"), "{{role}} {{replica}}"),
        ),
        Panel(
            "API keys",
            "Requests by key and what became of them; tokens by key.",
            "short",
            (
                Query(rate(m.KEY_REQUESTS, "key, outcome"), "{{key}} {{outcome}}, requests/s"),
                Query(rate(m.KEY_TOKENS, "key, kind"), "{{key}} {{kind}}, tokens/s"),
            ),
        ),
        Panel(
            "Processor time",
            "Cores, by process.",
            "short",
            one(rate(m.PROCESS_CPU_S, "role, replica"), "{{role}} {{replica}}"),
        ),
        Panel(
            "Open files",
            "By process.",
            "short",
            one(total(m.PROCESS_OPEN_FILES, "role, replica"), "{{role}} {{replica}}"),
        ),
    ]


def rows() -> dict[str, list[Panel]]:
    """All panels by row."""
    return {
        "Requests and objectives": _requests(),
        "Prefill": _side("prefill", "prefill|mixed"),
        "Decode": _side("decode", "decode|mixed"),
        "KV transfer": _transfer(),
        "Cache": _cache(),
        "Router": _router(),
        "Speculation, graphs, memory": _runner(),
        "Errors and processes": _health(),
    }
