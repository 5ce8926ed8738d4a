"""How KV blocks move from prefill to decode."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig

KvTransportName = Literal["auto", "shm", "ipc", "mori", "nixl", "tcp"]


class KvTransferConfig(FrozenConfig):
    """KV transfer between engines."""

    transport: KvTransportName = "auto"
    """auto: shm between processes of one host on CPUs, ipc on GPUs; tcp otherwise. RDMA, which is mori under
    ROCm and nixl under CUDA, has to be named: it trusts the network."""
    conditional_prefill: bool = True
    """A prompt that decode is expected to have sooner by computing it itself is not sent to prefill: when prefill has
    much to do, or the prompt is short, by measured times. Off: prefill computes all that `min_remote_tokens` lets."""
    min_remote_tokens: int = Field(16, ge=1)
    """Prompts with fewer uncached tokens than this are prefilled by the decode replica itself."""
    lease_s: float = Field(10.0, gt=0)
    """Published blocks are kept this long without a renewal from decode; renewals go out every third of it."""
    read_timeout_s: float = Field(10.0, gt=0)
    """One read of blocks fails after this."""
    prefill_timeout_s: float = Field(60.0, gt=0)
    """Decode gives up on a prefill that publishes nothing for this long, and computes the prompt itself."""
    verify_blocks: bool = True
    """Check every block's checksum before its first use and recompute bad ones. Without it, a read of a block whose
    lease ended on the way goes unnoticed."""
