"""Reads the configuration of gpt-oss. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.layer_types import LayerWindows, read_windows
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import ModelSpec, common_fields
from atom_cluster.ops.moe import ExpertActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class GptOssSpec(ModelSpec):
    """A mixture of experts."""

    attention: AttentionSpec
    """Of all layers, but for their windows."""
    windows: LayerWindows
    rope: RopeSpec
    moe: MoeSpec


def read_gpt_oss_spec(config: HfConfig) -> GptOssSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("hidden_act", "silu", default="silu")
    num_layers, head_dim = config.integer("num_hidden_layers"), config.integer("head_dim", 64)
    rope = read_rope(config, head_dim, default_theta=150_000.0)
    has_bias = config.flag("attention_bias", default=True)
    attention = AttentionSpec(
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        sink_name="sinks",
    )
    is_sliding = [index % 2 == 0 for index in range(num_layers)]
    return GptOssSpec(
        **common_fields(config, default_norm_eps=1e-5),
        attention=attention,
        windows=read_windows(config, window=config.integer("sliding_window", 128), is_sliding=is_sliding),
        rope=rope,
        moe=_read_moe(config),
    )


def _read_moe(config: HfConfig) -> MoeSpec:
    activation = ExpertActivation(
        kind="swiglu_oai", alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0)
    )
    return MoeSpec(
        num_experts=config.integer("num_local_experts"),
        hidden_size=config.integer("hidden_size"),
        expert_size=config.integer("intermediate_size"),
        activation=activation,
        has_bias=True,
        stacked_layout="interleaved",
        router=RouterSpec(
            experts_per_token=config.integer("num_experts_per_tok"),
            score="softmax_of_chosen",
            gate_name="router",
            has_logit_bias=True,
        ),
    )
