"""Reads the configuration of Gemma 3: of a text model, or of the text part of one that also sees. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.layer_types import LayerWindows, read_windows
from atom_cluster.models.rope_config import read_local_rope, read_rope
from atom_cluster.models.spec import ModelSpec, common_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Spec(ModelSpec):
    """A dense model."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    """Factor of query-key products."""
    windows: LayerWindows
    rope: RopeSpec
    """Of layers that see all positions."""
    local_rope: RopeSpec
    """Of layers with a window."""


def read_gemma3_spec(config: HfConfig) -> Gemma3Spec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config = config.language_model()
    config.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    for key in ("use_bidirectional_attention", "attention_bias"):
        if config.flag(key):
            raise config.error(key, "is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.require(key, None)
    num_layers, head_dim = config.integer("num_hidden_layers"), config.integer("head_dim")
    period = config.integer("sliding_window_pattern", 6)
    is_sliding = [(index + 1) % period != 0 for index in range(num_layers)]
    return Gemma3Spec(
        **common_fields(config, is_tied_by_default=True),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim,
        query_scale=config.number("query_pre_attn_scalar") ** -0.5,
        windows=read_windows(config, window=config.integer("sliding_window"), is_sliding=is_sliding),
        rope=read_rope(config, head_dim, label="full_attention", default_theta=1e6),
        local_rope=read_local_rope(config, head_dim, theta_key="rope_local_base_freq", default_theta=1e4),
    )
