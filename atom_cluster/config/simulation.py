"""A device that does not exist: coefficients of the simulated step runner's latency model."""

from __future__ import annotations

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class SimulationConfig(FrozenConfig):
    """step seconds = base_s + prefill tokens * per_prefill_token_s + decode rows * per_decode_row_s
    + context tokens * per_context_token_s."""

    base_s: float = Field(0.005, ge=0)
    """Seconds that every step takes."""
    per_prefill_token_s: float = Field(2e-5, ge=0)
    """Seconds per token of a prompt."""
    per_decode_row_s: float = Field(2e-5, ge=0)
    """Seconds per request that decodes."""
    per_context_token_s: float = Field(0.0, ge=0)
    """Seconds per token of context that is attended to."""
    kv_bytes_per_s: float = Field(1e10, gt=0)
    """Speed of simulated KV reads."""
    num_blocks: int = Field(4096, ge=2)
    """KV blocks per replica in place of `cache.num_blocks`."""
    draft_acceptance: float = Field(0.7, ge=0, le=1)
    """Probability that a draft is right, when `speculative` is configured."""
    vocab_size: int = Field(32000, ge=2)
    """Simulated token ids are below this."""
