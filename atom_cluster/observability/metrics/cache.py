"""The KV cache of an engine, and what goes from one engine's to another's."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import LATENCY_S, Metric

PREFIX_CACHE_QUERIES = Metric(
    name="atom_prefix_cache_queried_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens looked up in the prefix cache.",
    advice="The denominator of the hit rate.",
)
PREFIX_CACHE_HITS = Metric(
    name="atom_prefix_cache_hit_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens whose KV was found in the prefix cache.",
    advice="Far below `atom_router_expected_hit_tokens_total`: blocks are evicted between decision and use; more KV "
    "memory, or fewer replicas that share a prefix.",
)
PREFIX_CACHE_BLOCKS = Metric(
    name="atom_prefix_cache_blocks",
    kind="gauge",
    unit="blocks",
    help="Blocks that can be found by their prefix, in use or not.",
    advice="Always near all blocks is right: what is idle is evicted when it is needed.",
)
PREFIX_CACHE_EVICTIONS = Metric(
    name="atom_prefix_cache_evicted_blocks_total",
    kind="counter",
    unit="blocks",
    help="Blocks that ceased to be findable, since their memory was needed.",
    advice="High while the hit rate falls: the cache is smaller than what is asked for again. More KV memory.",
)
KV_BLOCKS = Metric(
    name="atom_kv_blocks",
    kind="gauge",
    unit="blocks",
    labels=("state",),
    help="Blocks by state: free, cached, running, leased or arriving. They add up to all blocks.",
    advice="`free` plus `cached` near zero: preemptions follow; lower `scheduler.max_num_requests`, or more KV memory. "
    "`leased` stays high without traffic: decode engines do not release.",
)
KV_PAGES = Metric(
    name="atom_kv_pages",
    kind="gauge",
    unit="pages",
    labels=("group", "state"),
    help="Pages of cache groups other than the first (windows, states) by state, as blocks.",
    advice="As `atom_kv_blocks`.",
)
PREEMPTIONS = Metric(
    name="atom_preemptions_total",
    kind="counter",
    unit="requests",
    labels=("cause",),
    help="Times a request gave up its blocks to be recomputed later. other_grows: one before it needed them. "
    "own_growth: it was last itself. admission: nobody ran, and one before it needed them to begin.",
    advice="More than a few per minute: work is done twice. Fewer rows (`max_num_requests`) or more KV memory.",
)
KV_TRANSFER_BYTES = Metric(
    name="atom_kv_transfer_bytes_total",
    kind="counter",
    unit="bytes",
    labels=("transport",),
    help="KV read from prefill engines, all ranks, by the transport that rank 0 reads through.",
    advice="`tcp` where `mori`, `nixl` or `ipc` is expected: /v1/cluster says why (`kv_transport`).",
)
KV_TRANSFER_S = Metric(
    name="atom_kv_transfer_seconds",
    kind="histogram",
    unit="s",
    labels=("transport",),
    buckets=LATENCY_S,
    help="Duration of one KV read that succeeded.",
    advice="Bytes per second far below what the link can do: other traffic, or small blocks.",
)
KV_READS = Metric(
    name="atom_kv_reads_total",
    kind="counter",
    unit="reads",
    labels=("transport", "outcome"),
    help="KV reads that ended, by transport (none: the peer was never connected) and outcome: ok, damaged or failed.",
    advice="`failed`: the peer or the link; the request is computed where it decodes. `damaged`: see the bad blocks.",
)
KV_PUBLISH_S = Metric(
    name="atom_kv_publish_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From a prompt's last chunk being computed to its last publication, which has the first token. By prefill.",
    advice="The cost of checksums. Above a few ms: the device is busy with the next prompt.",
)
KV_EXPOSED_S = Metric(
    name="atom_kv_exposed_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From a prompt's last publication to the end of its last KV read: reading that no computing hid.",
    advice="Part of the wait for a second token. Large: a faster transport, or smaller chunks of prompts, so that "
    "more is read while prefill computes.",
)
KV_TRANSFER_FAILURES = Metric(
    name="atom_kv_transfer_failures_total",
    kind="counter",
    unit="tickets",
    labels=("reason",),
    help="Handoffs that ended without usable KV; the request was prefilled where it decodes, which is the one retry. "
    "Reasons: mismatch, no_transport, prefill_failed, read_failed, protocol, peer_lost, timeout.",
    advice="Any rate: clients only wait longer, but decode does prefill's work. Its log names the peer.",
)
KV_BAD_BLOCKS = Metric(
    name="atom_kv_bad_blocks_total",
    kind="counter",
    unit="blocks",
    help="Blocks whose checksum was wrong after the transfer; they are computed again.",
    advice="Must be 0. Anything else is a fault of memory, link or driver: take the pair out and find out which.",
)
KV_LEASE_EXPIRIES = Metric(
    name="atom_kv_lease_expiries_total",
    kind="counter",
    unit="tickets",
    help="Tickets that decode did not renew in time, so that prefill took their blocks back. By prefill.",
    advice="Decode died, stands still or cannot be reached. With long steps on decode: a longer `kv_transfer.lease_s`.",
)
TICKETS_OPEN = Metric(
    name="atom_tickets_open",
    kind="gauge",
    unit="tickets",
    labels=("state",),
    help="Handoffs under way. On prefill: computing, publishing, published. On decode: asked, receiving, draining.",
    advice="`published` grows: decode does not read. `asked` grows: prefill's queue. `draining` stays: a read hangs.",
)
