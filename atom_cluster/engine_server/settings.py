"""EngineHostSettings: what an engine host needs beyond its runner, as plain values that can be sent to its process."""

from __future__ import annotations

from dataclasses import dataclass, field

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.messages.cluster import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHostSettings:
    """One engine's place in the cluster and its policies."""

    peer_id: str
    role: Role
    model: str
    """Name shown to operators."""
    host: str = "127.0.0.1"
    """Address of this node to listen on."""
    secret: bytes = field(default=b"", repr=False)
    """The cluster's secret."""
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: KvTransferConfig = KvTransferConfig()
    prefix_caching: bool = True
    faults: FaultsConfig | None = None
    load_period_s: float = 0.1
    ping_period_s: float = 1.0
    client_timeout_s: float = 5.0
    metrics_period_s: float = 1.0
    choices: dict[str, str] = field(default_factory=dict)
    """Automatic choices made before the runner was built, and why."""
