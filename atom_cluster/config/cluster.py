"""ClusterConfig: the root of the configuration tree, the `args:` of a Serve YAML."""

from __future__ import annotations

from pydantic import model_validator

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.cache import CacheConfig
from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.faults import FaultsConfig
from atom_cluster.config.model import ModelOptions
from atom_cluster.config.observability import ObservabilityConfig
from atom_cluster.config.ops import OpsConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.config.routing import RoutingConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.serving import ApiConfig, ServingConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.config.transfer import KvTransferConfig


class ClusterConfig(FrozenConfig):
    """One cluster serving one model: either `prefill` and `decode` groups, or one `unified` group."""

    model: str
    """Local directory, hub id, or `demo:smollm2-135m-instruct`, which `atom-cluster get-demo-model` fetches."""
    model_options: ModelOptions = ModelOptions()
    """Everything about the model except its name."""
    prefill: GroupConfig | None = None
    """Replicas that compute prompts. Needs `decode`."""
    decode: GroupConfig | None = None
    """Replicas that generate tokens. Needs `prefill`."""
    unified: GroupConfig | None = None
    """Replicas that do both; instead of `prefill` and `decode`."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """How every engine fills its steps."""
    cache: CacheConfig = CacheConfig()
    """KV blocks of every engine."""
    speculative: SpeculativeConfig | None = None
    """Draft tokens and verify them; null: one token per step."""
    kv_transfer: KvTransferConfig = KvTransferConfig()
    """How KV blocks move from prefill to decode."""
    router: RoutingConfig = RoutingConfig()
    """How replicas are chosen for a request."""
    quantization: QuantizationConfig = QuantizationConfig()
    """Quantization of a float checkpoint while it is loaded."""
    compilation: CompilationConfig = CompilationConfig()
    """Graphs on GPUs."""
    ops: OpsConfig = OpsConfig()
    """Which implementation each op uses."""
    api: ApiConfig = ApiConfig()
    """Limits of the HTTP API."""
    serving: ServingConfig = ServingConfig()
    """Processes and their supervision."""
    observability: ObservabilityConfig = ObservabilityConfig()
    """Logs and metrics."""
    faults: FaultsConfig | None = None
    """Faults on purpose, for drills."""
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

    @model_validator(mode="after")
    def _pairs_can_exchange_blocks(self) -> ClusterConfig:
        if self.prefill is None or self.decode is None:
            return self
        prefill, decode = self.block_size_of(self.prefill), self.block_size_of(self.decode)
        if max(prefill, decode) % min(prefill, decode):
            raise ValueError(
                f"blocks of `prefill` have {prefill} tokens and those of `decode` {decode}: one must be a multiple of "
                "the other (`cache.block_size`, or `block_size` of the group)"
            )
        return self

    def block_size_of(self, group: GroupConfig) -> int:
        """Tokens per KV block of a group."""
        return self.cache.block_size if group.block_size is None else group.block_size

    @property
    def num_drafts(self) -> int:
        """Tokens drafted behind each sampled one."""
        return 0 if self.speculative is None else self.speculative.num_tokens

    def groups(self) -> dict[str, GroupConfig]:
        """The configured groups by role: prefill and decode, or unified."""
        roles = {"prefill": self.prefill, "decode": self.decode, "unified": self.unified}
        return {role: group for role, group in roles.items() if group is not None}
