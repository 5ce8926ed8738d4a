"""MoeDecoderSpec: a decoder of grouped-query attention and experts, described in full. Families read it; no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeDecoderSpec(ModelSpec):
    """A pre-norm decoder whose layers have experts, or a gated MLP."""

    attention: AttentionSpec
    rope: RopeSpec
    moe: MoeSpec
    moe_name: str = "mlp"
    """Of a layer's mixture of experts in checkpoints."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that have a gated MLP, `mlp`, instead of experts."""
    dense_size: int | None = None
    """Intermediate dims of that; None where there are no such layers."""


def read_num_experts(config: HfConfig) -> int:
    """The number of routed experts, which goes by several keys."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return config.integer(next((key for key in keys if key in config), keys[0]))


def refuse_unsupported(config: HfConfig) -> None:
    """Raise ConfigError for what none of the families' checkpoints has and the layers do not do."""
    config.require("hidden_act", "silu", default="silu")
    if config.flag("use_sliding_window"):
        raise config.error("use_sliding_window", "is not supported for this family")
