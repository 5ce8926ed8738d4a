"""Reads the configuration of Llama 2 and 3, Mistral, Ministral, Qwen2 and Qwen3. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.layer_types import LayerWindows, read_windows
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import ModelSpec, common_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSpec(ModelSpec):
    """A dense model of the Llama family."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    has_qkv_bias: bool
    has_attention_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    """RMS norm over each query and key head before rotation."""
    windows: LayerWindows


def read_llama_spec(config: HfConfig) -> LlamaSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("hidden_act", "silu", default="silu")
    num_heads = config.integer("num_attention_heads")
    is_qwen2, is_qwen3 = (config.architecture.startswith(name) for name in ("Qwen2", "Qwen3"))
    head_dim = config.integer("head_dim", 128 if is_qwen3 else config.integer("hidden_size") // num_heads)
    rope = read_rope(config, head_dim)
    has_attention_bias = not is_qwen2 and config.flag("attention_bias")
    return LlamaSpec(
        **common_fields(config),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rope=rope,
        has_qkv_bias=is_qwen2 or has_attention_bias,
        has_attention_output_bias=has_attention_bias,
        has_mlp_bias=config.flag("mlp_bias"),
        has_qk_norm=is_qwen3,
        windows=_read_windows(config),
    )


def _read_windows(config: HfConfig) -> LayerWindows:
    num_layers, default = config.integer("num_hidden_layers"), 4096
    window, first_sliding = None, 0
    if config.architecture.startswith("Qwen"):
        if config.flag("use_sliding_window"):
            window = config.integer("sliding_window", default)
        first_sliding = config.integer("max_window_layers", 28, least=0)
    elif config.architecture.startswith(("Mistral", "Ministral")):
        # Null means none here, and absent means the default.
        window = config.optional_integer("sliding_window") if "sliding_window" in config.values else default
    is_sliding = [window is not None and index >= first_sliding for index in range(num_layers)]
    return read_windows(config, window=window, is_sliding=is_sliding)
