"""The router: decisions, what it knows, who is there."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import SHORT_S, Metric

ROUTER_DECISIONS = Metric(
    name="atom_router_decisions_total",
    kind="counter",
    unit="requests",
    labels=("reason",),
    help="Routing decisions by reason, see `atom_cluster.routing.policy.REASONS`.",
    advice="`no_engine`, `none_eligible`: nobody can serve. `router_away`: the router did not answer. `no_prefill`, "
    "`no_decode`: a role is missing. `fingerprint_mismatch`: two versions, or unequal weights.",
)
ROUTER_PLACES = Metric(
    name="atom_router_prompt_places_total",
    kind="counter",
    unit="requests",
    labels=("place",),
    help="Where prompts are computed, and why, see `atom_cluster.routing.prompt_place.PLACES`.",
    advice="Much `prefill_busy`: add prefill. Hardly any `remote`: prompts are short, fewer prefill replicas will do.",
)
ROUTER_QUERY_S = Metric(
    name="atom_router_query_seconds",
    kind="histogram",
    unit="s",
    buckets=SHORT_S,
    help="From an ingress asking the router to its answer, or to giving up.",
    advice="Above 10 ms: the router's core is busy; it gives up after `router.query_timeout_s`.",
)
ROUTER_INDEX_BLOCKS = Metric(
    name="atom_router_index_blocks",
    kind="gauge",
    unit="blocks",
    help="Entries (replica, block) in the router's prefix index.",
    advice="At `router.max_index_blocks`: it forgets prefixes that engines still have.",
)
ROUTER_SNAPSHOTS = Metric(
    name="atom_router_snapshot_requests_total",
    kind="counter",
    unit="snapshots",
    help="Snapshots of an engine's cache that the router asked for, as a new router or after a lost event.",
    advice="More than one per start of a replica: events are lost on the way.",
)
ROUTER_MEMBERS = Metric(
    name="atom_router_members",
    kind="gauge",
    unit="members",
    labels=("kind",),
    help="Members heard from recently: ingress, prefill, decode or unified.",
    advice="Below the configured replicas: one is starting, draining or failed; `serve status` says which.",
)
ROUTER_MEMBER_CHANGES = Metric(
    name="atom_router_member_changes_total",
    kind="counter",
    unit="members",
    labels=("kind", "change"),
    help="Members that joined (restarted gangs do as new ones), left, were lost (connection gone) or silent too long.",
    advice="`lost` or `silent`: a process died or stands still. `joined` again and again: a gang restarts in a loop.",
)
ROUTER_PROMPT_TOKENS = Metric(
    name="atom_router_prompt_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens of the prompts that the router placed.",
    advice="The denominator of the expected hit rate.",
)
ROUTER_EXPECTED_HITS = Metric(
    name="atom_router_expected_hit_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens that the router believed to be cached by the chosen pair, the better of the two.",
    advice="Compare with `atom_prefix_cache_hit_tokens_total`, which is what engines found.",
)
ROUTER_IMBALANCE = Metric(
    name="atom_router_load_imbalance_ratio",
    kind="gauge",
    unit="ratio",
    labels=("group",),
    help="Work of the busiest replica of a group (prefill, decode, unified) over the group's mean, as the router "
    "estimates it; 1 is balance, and what an idle group has.",
    advice="Above 2 for long with much traffic: one prefix is hot; lower `router.load_factor`.",
)
