"""RankInfo: what one rank turned out to be, as plain values that can be sent to the process of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.start import StartFacts

NO_TRACES = "no directory for traces is configured: set observability.profile.directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Facts known once a rank has loaded its model and allocated its KV memory.

    Equal on all ranks of a gang except `rank`, `kv_descriptors`, `choices` and `start`.
    """

    num_blocks: int
    """Pages of the first cache group."""
    block_size: int
    """Tokens per block."""
    max_num_requests: int
    max_model_len: int
    vocab_size: int
    rank: int = 0
    world_size: int = 1
    other_groups: tuple[PageGroup, ...] = ()
    """Pages of the cache groups behind the first."""
    max_drafts: int = 0
    """Tokens drafted behind each sampled one."""
    kv_descriptors: dict[str, bytes] = field(default_factory=dict)
    """How peers read this rank's KV memory, by transport, best first; input of `kv_transfer.combine.merge_offers`."""
    fingerprint_fields: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    start: StartFacts = StartFacts()
    """Differs between ranks, as `choices` may."""
    profile_refusal: str = NO_TRACES
    """Why this rank takes no window commands; empty when it does."""
