"""The paged KV cache and its prefix cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class CacheConfig(FrozenConfig):
    """KV blocks of one replica."""

    block_size: int = Field(16, ge=1, le=1024)
    """Tokens per KV block, of groups that do not have their own."""
    num_blocks: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """KV blocks per replica. auto: what `memory_fraction` leaves on GPUs, `cpu_cache_gib` on CPUs."""
    cpu_cache_gib: float = Field(0.5, gt=0)
    """KV memory per rank on CPUs, in GiB, when `num_blocks` is auto."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Dtype of keys and values. auto: that of activations. fp8: half of bfloat16's memory, rounded to three bits of
    mantissa, with the scales of the checkpoint if it has any."""
    prefix_caching: bool = True
    """Reuse KV of equal prompt prefixes between requests."""
