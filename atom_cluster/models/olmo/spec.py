"""Reads the configuration of OLMo 2 and 3. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.layer_types import LayerWindows, read_windows
from atom_cluster.models.rope_config import read_local_rope, read_rope
from atom_cluster.models.spec import ModelSpec, common_fields

_THETA = 5e5
"""Of OLMo 3, where the configuration leaves it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoSpec(ModelSpec):
    """A dense model."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_attention_bias: bool
    windows: LayerWindows
    """All None in OLMo 2."""
    rope: RopeSpec
    """Of layers that see all positions."""
    local_rope: RopeSpec
    """Of layers with a window."""


def read_olmo_spec(config: HfConfig) -> OlmoSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("hidden_act", "silu", default="silu")
    has_windows = config.architecture.startswith("Olmo3")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", config.integer("hidden_size") // num_heads)
    default_theta = _THETA if has_windows else 1e4
    rope = read_rope(config, head_dim, label="full_attention", default_theta=default_theta)
    return OlmoSpec(
        **common_fields(config),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        has_attention_bias=config.flag("attention_bias"),
        windows=_read_windows(config, has_windows=has_windows),
        rope=rope,
        local_rope=read_local_rope(config, head_dim, theta_key="rope_theta", default_theta=default_theta),
    )


def _read_windows(config: HfConfig, *, has_windows: bool) -> LayerWindows:
    num_layers = config.integer("num_hidden_layers")
    if not has_windows:
        return (None,) * num_layers
    is_sliding = [(index + 1) % 4 != 0 for index in range(num_layers)]
    return read_windows(config, window=config.integer("sliding_window", 4096), is_sliding=is_sliding)
