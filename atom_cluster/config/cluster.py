"""ClusterConfig: the root of the configuration tree, the `args:` of a Serve YAML."""

from __future__ import annotations

from pydantic import model_validator

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.cache import CacheConfig
from atom_cluster.config.model import ModelOptions
from atom_cluster.config.observability import ObservabilityConfig
from atom_cluster.config.ops import OpsConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.routing import RoutingConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.serving import ApiConfig, ServingConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.transfer import KvTransferConfig


class ClusterConfig(FrozenConfig):
    """One cluster serving one model: either `prefill` and `decode` groups, or one `unified` group."""

    model: str
    """Local directory or hub id of the model."""
    model_options: ModelOptions = ModelOptions()
    prefill: GroupConfig | None = None
    decode: GroupConfig | None = None
    unified: GroupConfig | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    kv_transfer: KvTransferConfig = KvTransferConfig()
    router: RoutingConfig = RoutingConfig()
    ops: OpsConfig = OpsConfig()
    api: ApiConfig = ApiConfig()
    serving: ServingConfig = ServingConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    simulation: SimulationConfig | None = None
    """Replace every model runner by a simulated one; only the tokenizer of `model` is loaded."""

    @model_validator(mode="after")
    def _groups_fit_together(self) -> ClusterConfig:
        has_pair = self.prefill is not None and self.decode is not None
        has_unified = self.unified is not None
        if (self.prefill is None) != (self.decode is None):
            raise ValueError("`prefill` and `decode` come together: give both, or `unified` alone")
        if has_pair == has_unified:
            raise ValueError("give either `prefill` and `decode`, or `unified`, and not both")
        return self
