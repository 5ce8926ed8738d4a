"""Every metric of the cluster in one table, and the protocol through which the code records them.

Whoever records names a constant of the table (`metrics.inc(PREEMPTIONS)`), so a metric cannot be misspelt, undocumented
or recorded with other labels than its own. Exporters implement `MetricSink`: `NullMetrics` here, `MemoryMetrics` in
`observability.memory` (Prometheus text, tests), one over Ray's metrics in `gang`. They add constant labels of their
own, such as replica and role. This module knows nothing of exporters, Ray or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

MetricKind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table."""

    name: str
    """Full Prometheus name: starts with `atom_`, ends with the unit, counters end with `_total`."""
    kind: MetricKind
    help: str
    unit: str
    """`s`, `bytes`, `tokens`, `blocks`, `requests` ...: what one is one of."""
    labels: tuple[str, ...] = ()
    """Names of the labels that each recording gives, all of them and no others."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, increasing, without infinity. Empty for other kinds."""


class MetricSink(Protocol):
    """Where recordings go. Cheap, thread-safe, never raises for lack of an exporter."""

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Replace the value of a gauge."""
        ...

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...


class NullMetrics:
    """A `MetricSink` that records nothing."""

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Ignore."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Ignore."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Ignore."""


_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SHORT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKENS = tuple(float(2**power) for power in range(0, 15))

# --- requests, recorded by the engine that answers them ---------------------------------------------------------------

REQUESTS_RUNNING = Metric(
    name="atom_requests_running", kind="gauge", unit="requests", help="Requests that hold a row of the runner."
)
REQUESTS_WAITING = Metric(
    name="atom_requests_waiting", kind="gauge", unit="requests", help="Requests admitted and not running yet."
)
WAITING_TOKENS = Metric(
    name="atom_waiting_tokens",
    kind="gauge",
    unit="tokens",
    help="Prompt tokens not computed yet, of waiting and running requests.",
)
REQUESTS_FINISHED = Metric(
    name="atom_requests_finished_total",
    kind="counter",
    unit="requests",
    labels=("reason",),
    help="Requests that ended, by finish reason: stop, length, abort or error.",
)
TTFT_S = Metric(
    name="atom_time_to_first_token_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From a request's arrival at its engine to its first token.",
)
ITL_S = Metric(
    name="atom_inter_token_latency_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From one token of a request to its next.",
)
E2E_S = Metric(
    name="atom_request_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From a request's arrival at its engine to its end.",
)
QUEUE_S = Metric(
    name="atom_request_queue_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From a request's arrival at its engine to its first being scheduled or handed to prefill.",
)
PROMPT_TOKENS = Metric(
    name="atom_prompt_tokens_total", kind="counter", unit="tokens", help="Prompt tokens of admitted requests."
)
GENERATION_TOKENS = Metric(
    name="atom_generation_tokens_total", kind="counter", unit="tokens", help="Output tokens emitted."
)

# --- KV cache ---------------------------------------------------------------------------------------------------------

PREFIX_CACHE_QUERIES = Metric(
    name="atom_prefix_cache_queried_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens looked up in the prefix cache.",
)
PREFIX_CACHE_HITS = Metric(
    name="atom_prefix_cache_hit_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens whose KV was found in the prefix cache.",
)
KV_BLOCKS = Metric(
    name="atom_kv_blocks",
    kind="gauge",
    unit="blocks",
    labels=("state",),
    help="Blocks by state: free, cached, running, leased or arriving. They add up to all blocks.",
)
KV_PAGES = Metric(
    name="atom_kv_pages",
    kind="gauge",
    unit="pages",
    labels=("group", "state"),
    help="Pages of cache groups other than the first (windows, states) by state, as blocks.",
)
PREEMPTIONS = Metric(
    name="atom_preemptions_total",
    kind="counter",
    unit="requests",
    help="Times a running request gave up its blocks to be recomputed later.",
)

# --- KV transfer, recorded by the decode side unless it says otherwise ------------------------------------------------

KV_TRANSFER_BYTES = Metric(
    name="atom_kv_transfer_bytes_total", kind="counter", unit="bytes", help="KV read from prefill engines, all ranks."
)
KV_TRANSFER_S = Metric(
    name="atom_kv_transfer_seconds", kind="histogram", unit="s", buckets=_LATENCY_S, help="Duration of one KV read."
)
KV_PUBLISH_S = Metric(
    name="atom_kv_publish_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From a prompt's last chunk being computed to its last publication, which has the first token. By prefill.",
)
KV_EXPOSED_S = Metric(
    name="atom_kv_exposed_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From a prompt's last publication to the end of its last KV read: reading that no computing hid.",
)
KV_TRANSFER_FAILURES = Metric(
    name="atom_kv_transfer_failures_total",
    kind="counter",
    unit="tickets",
    labels=("reason",),
    help="Handoffs that ended without usable KV; the request was prefilled where it decodes.",
)
KV_BAD_BLOCKS = Metric(
    name="atom_kv_bad_blocks_total",
    kind="counter",
    unit="blocks",
    help="Blocks whose checksum was wrong after the transfer; they are computed again.",
)
TICKETS_OPEN = Metric(
    name="atom_tickets_open", kind="gauge", unit="tickets", help="Handoffs under way on either side of this engine."
)

# --- steps ------------------------------------------------------------------------------------------------------------

STEP_S = Metric(
    name="atom_step_seconds",
    kind="histogram",
    unit="s",
    buckets=_SHORT_S + (2.5, 5.0),
    help="Time the runner spent on one step.",
)
STEP_TOKENS = Metric(
    name="atom_step_tokens", kind="histogram", unit="tokens", buckets=_TOKENS, help="Tokens computed by one step."
)

SPEC_DRAFT_TOKENS = Metric(
    name="atom_spec_draft_tokens_total",
    kind="counter",
    unit="tokens",
    labels=("position",),
    help="Drafts verified, by their position behind the sampled token, from 0.",
)
SPEC_ACCEPTED_TOKENS = Metric(
    name="atom_spec_accepted_tokens_total",
    kind="counter",
    unit="tokens",
    labels=("position",),
    help="Drafts verified and kept, by their position behind the sampled token, from 0.",
)

# --- router -----------------------------------------------------------------------------------------------------------

ROUTER_DECISIONS = Metric(
    name="atom_router_decisions_total",
    kind="counter",
    unit="requests",
    labels=("reason",),
    help="Routing decisions by reason, see `atom_cluster.routing.policy.REASONS`.",
)
ROUTER_PLACES = Metric(
    name="atom_router_prompt_places_total",
    kind="counter",
    unit="requests",
    labels=("place",),
    help="Where prompts are computed, and why, see `atom_cluster.routing.prompt_place.PLACES`.",
)
ROUTER_QUERY_S = Metric(
    name="atom_router_query_seconds",
    kind="histogram",
    unit="s",
    buckets=_SHORT_S,
    help="From an ingress asking the router to its answer, or to giving up.",
)
ROUTER_INDEX_BLOCKS = Metric(
    name="atom_router_index_blocks",
    kind="gauge",
    unit="blocks",
    help="Entries (replica, block) in the router's prefix index.",
)
ROUTER_SNAPSHOTS = Metric(
    name="atom_router_snapshot_requests_total",
    kind="counter",
    unit="snapshots",
    help="Snapshots of an engine's cache that the router asked for, as a new router or after a lost event.",
)
ROUTER_MEMBERS = Metric(
    name="atom_router_members",
    kind="gauge",
    unit="members",
    labels=("kind",),
    help="Members heard from recently: ingress, prefill, decode or unified.",
)

# --- ingress ----------------------------------------------------------------------------------------------------------

HTTP_REQUESTS = Metric(
    name="atom_http_requests_total",
    kind="counter",
    unit="requests",
    labels=("route", "status"),
    help="HTTP requests answered, by route template and status code.",
)
HTTP_REQUESTS_OPEN = Metric(
    name="atom_http_requests_open", kind="gauge", unit="requests", help="HTTP requests being answered."
)
HTTP_TTFT_S = Metric(
    name="atom_http_time_to_first_token_seconds",
    kind="histogram",
    unit="s",
    buckets=_LATENCY_S,
    help="From an HTTP request's arrival at the ingress to its first token there.",
)
REQUESTS_MOVED = Metric(
    name="atom_requests_moved_total",
    kind="counter",
    unit="requests",
    help="Requests that a draining engine gave up, for others to go on with.",
)
REQUESTS_REPLAYED = Metric(
    name="atom_requests_replayed_total",
    kind="counter",
    unit="requests",
    help="Times a request went on with another engine, since its own was lost or would not take it.",
)

ALL_METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""The table, in the order of this file."""
