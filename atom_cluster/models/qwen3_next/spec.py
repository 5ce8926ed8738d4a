"""Reads the configuration of Qwen3-Next. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.gated_delta_net import GatedDeltaSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import ModelSpec, common_fields

_KINDS = ("linear_attention", "full_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridSpec(ModelSpec):
    """A decoder whose layers have linear or full attention, and experts or a gated MLP."""

    attention: AttentionSpec
    rope: RopeSpec
    linear_attention: GatedDeltaSpec
    linear_layers: frozenset[int]
    """Layers with linear attention."""
    moe: MoeSpec | None
    """None where no layer has experts."""
    dense_layers: frozenset[int]
    """Layers with a gated MLP. The layer that drafts has one if all layers do."""
    dense_size: int | None
    """Intermediate dims of that; None where there are no such layers."""


def read_qwen3_next_spec(config: HfConfig) -> HybridSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    return read_hybrid_spec(
        config,
        is_grouped=True,
        moe=read_moe(config, renormalize=config.flag("norm_topk_prob", default=True)),
        dense_layers=_layers_without_experts(config),
        # Checkpoints have the layer though their configurations do not mention it.
        num_draft_layers=config.integer("num_nextn_predict_layers", 1, least=0),
    )


def read_hybrid_spec(
    config: HfConfig, *, is_grouped: bool, moe: MoeSpec | None, dense_layers: frozenset[int], num_draft_layers: int
) -> HybridSpec:
    """What models of this kind say alike, together with the rest. is_grouped: as in `GatedDeltaSpec`.

    Raises ConfigError naming the key that is missing, wrong or unsupported.
    """
    config.require("hidden_act", "silu", default="silu")
    head_dim = config.integer("head_dim", 256)
    rope = read_rope(config, head_dim, default_partial=0.25)
    return HybridSpec(
        **common_fields(config),
        num_draft_layers=num_draft_layers,
        attention=_read_attention(config, head_dim),
        rope=rope,
        linear_attention=_read_linear_attention(config, is_grouped=is_grouped),
        linear_layers=_linear_layers(config),
        moe=moe,
        dense_layers=dense_layers,
        dense_size=config.integer("intermediate_size") if dense_layers else None,
    )


def read_moe(config: HfConfig, *, renormalize: bool) -> MoeSpec:
    """Routed experts, and a shared one with a gate."""
    return MoeSpec(
        hidden_size=config.integer("hidden_size"),
        num_experts=config.integer("num_experts"),
        expert_size=config.integer("moe_intermediate_size"),
        router=RouterSpec(experts_per_token=config.integer("num_experts_per_tok"), renormalize=renormalize),
        shared_size=config.integer("shared_expert_intermediate_size"),
        shared_name="shared_expert",
        shared_gate_name="shared_expert_gate",
    )


def _read_attention(config: HfConfig, head_dim: int) -> AttentionSpec:
    return AttentionSpec(
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim,
        has_qkv_bias=config.flag("attention_bias"),
        has_output_bias=config.flag("attention_bias"),
        has_output_gate=True,
        qk_norm="head",
        norm_eps=config.number("rms_norm_eps", 1e-6),
        is_norm_offset=True,
    )


def _read_linear_attention(config: HfConfig, *, is_grouped: bool) -> GatedDeltaSpec:
    num_key_heads, num_value_heads = (config.integer(f"linear_num_{kind}_heads") for kind in ("key", "value"))
    if num_value_heads % num_key_heads:
        raise config.error("linear_num_value_heads", f"{num_value_heads} is no multiple of {num_key_heads} key heads")
    return GatedDeltaSpec(
        hidden_size=config.integer("hidden_size"),
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_dim=config.integer("linear_key_head_dim"),
        value_dim=config.integer("linear_value_head_dim"),
        conv_size=config.integer("linear_conv_kernel_dim", 4, least=2),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        is_grouped=is_grouped,
    )


def _linear_layers(config: HfConfig) -> frozenset[int]:
    num_layers, interval = config.integer("num_hidden_layers"), config.integer("full_attention_interval", 4)
    kinds = config.strings("layer_types")
    if kinds is None:
        kinds = tuple(_KINDS[(index + 1) % interval == 0] for index in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise config.error("layer_types", f"must name one of {', '.join(_KINDS)} for each of {num_layers} layers")
    return frozenset(index for index, kind in enumerate(kinds) if kind == "linear_attention")


def _layers_without_experts(config: HfConfig) -> frozenset[int]:
    step = config.integer("decoder_sparse_step", 1)
    layers = range(config.integer("num_hidden_layers"))
    return frozenset(config.integers("mlp_only_layers")) | {index for index in layers if (index + 1) % step != 0}
