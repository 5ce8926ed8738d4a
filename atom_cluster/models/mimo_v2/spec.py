"""Reads the configuration of MiMo-V2-Flash, as on the hub or as transformers writes it. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.layer_types import LayerWindows, read_windows
from atom_cluster.models.rope_config import read_local_rope, read_rope
from atom_cluster.models.spec import ModelSpec, common_fields

_NUM_DRAFT_LAYERS = 3
"""Of the checkpoint on the hub, whose configuration does not say."""
_PARTIAL_ROTARY = 0.334
_VALUE_SCALE = 0.707
_WINDOW = 129


@dataclass(frozen=True, slots=True, kw_only=True)
class MimoV2Spec(ModelSpec):
    """A mixture of experts."""

    full_attention: AttentionSpec
    """Of layers that see all positions."""
    local_attention: AttentionSpec
    """Of layers with a window, and of those that draft."""
    windows: LayerWindows
    rope: RopeSpec
    local_rope: RopeSpec
    moe: MoeSpec
    dense_layers: frozenset[int]
    """Layers with a gated MLP instead of experts."""
    dense_size: int
    """Intermediate dims of that, and of the layers that draft."""


def read_mimo_v2_spec(config: HfConfig) -> MimoV2Spec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("hidden_act", "silu", default="silu")
    config.require("n_shared_experts", None, 0)
    num_layers = config.integer("num_hidden_layers")
    full, local = _read_attention(config, window=None), _read_attention(config, window=_read_window(config))
    rope = read_rope(config, full.head_dim, label="full_attention", default_theta=5e6, default_partial=_PARTIAL_ROTARY)
    eps_key = "layernorm_epsilon" if "layernorm_epsilon" in config else "rms_norm_eps"
    return MimoV2Spec(
        **common_fields(config, norm_eps_key=eps_key, default_norm_eps=1e-5),
        num_draft_layers=config.integer("num_nextn_predict_layers", _NUM_DRAFT_LAYERS, least=0),
        full_attention=full,
        local_attention=local,
        windows=read_windows(config, window=local.window, is_sliding=_is_sliding(config, num_layers)),
        rope=rope,
        local_rope=read_local_rope(
            config,
            local.head_dim,
            theta_key="swa_rope_theta",
            default_theta=1e4,
            default_partial=_PARTIAL_ROTARY,
        ),
        moe=_read_moe(config),
        dense_layers=_dense_layers(config, num_layers),
        dense_size=config.integer("intermediate_size"),
    )


def _read_window(config: HfConfig) -> int:
    """The hub's `sliding_window_size` does not count the token itself; `sliding_window` alone does."""
    size = config.optional_integer("sliding_window_size")
    return config.integer("sliding_window", _WINDOW) if size is None else size + 1


def _read_attention(config: HfConfig, *, window: int | None) -> AttentionSpec:
    """Of layers without a window, or with this one: they have sizes of their own, by default twice the KV heads."""
    heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    head_dim, value_dim = config.integer("head_dim", 192), config.integer("v_head_dim", 128)
    has_sinks = config.flag("add_full_attention_sink_bias")
    if window is not None:
        heads = config.integer("swa_num_attention_heads", heads)
        kv_heads = config.integer("swa_num_key_value_heads", 2 * kv_heads)
        head_dim = config.integer("swa_head_dim", head_dim)
        value_dim = config.integer("swa_v_head_dim", value_dim)
        has_sinks = config.flag("add_swa_attention_sink_bias", default=True)
    is_scaled = "attention_value_scale" in config or "attention_value_scale" not in config.values
    return AttentionSpec(
        hidden_size=config.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        window=window,
        value_scale=config.number("attention_value_scale", _VALUE_SCALE) if is_scaled else 1.0,
        has_qkv_bias=config.flag("attention_bias"),
        sink_name="attention_sink_bias" if has_sinks else None,
    )


def _is_sliding(config: HfConfig, num_layers: int) -> list[bool]:
    """`hybrid_layer_pattern`, or else the first layer and every sixth see everything."""
    pattern = _per_layer(config, "hybrid_layer_pattern", num_layers)
    if pattern is not None:
        return [kind == 1 for kind in pattern]
    return [index != 0 and (index + 1) % 6 != 0 for index in range(num_layers)]


def _dense_layers(config: HfConfig, num_layers: int) -> frozenset[int]:
    """Those that `moe_layer_freq` or `mlp_layer_types` says, or else the first."""
    has_experts = _per_layer(config, "moe_layer_freq", num_layers)
    if has_experts is not None:
        return frozenset(index for index, has in enumerate(has_experts) if has == 0)
    kinds = config.strings("mlp_layer_types")
    if kinds is None:
        return frozenset({0})
    if len(kinds) != num_layers or set(kinds) - {"dense", "sparse"}:
        raise config.error("mlp_layer_types", f"must say dense or sparse for {num_layers} layers, got {kinds!r}")
    return frozenset(index for index, kind in enumerate(kinds) if kind == "dense")


def _per_layer(config: HfConfig, key: str, num_layers: int) -> tuple[int, ...] | None:
    if key not in config:
        return None
    values = config.integers(key)
    if len(values) != num_layers or set(values) - {0, 1}:
        raise config.error(key, f"must have 0 or 1 for each of {num_layers} layers, got {values!r}")
    return values


def _read_moe(config: HfConfig) -> MoeSpec:
    config.require("scoring_func", "sigmoid", default="sigmoid")
    config.require("topk_method", "noaux_tc", default="noaux_tc")
    return MoeSpec(
        num_experts=config.integer("n_routed_experts"),
        hidden_size=config.integer("hidden_size"),
        expert_size=config.integer("moe_intermediate_size"),
        router=RouterSpec(
            experts_per_token=config.integer("num_experts_per_tok"),
            score="sigmoid",
            renormalize=config.flag("norm_topk_prob", default=True),
            renorm_eps=1e-20,
            scale=config.number("routed_scaling_factor", 1.0),
            num_groups=config.integer("n_group", 1),
            topk_groups=config.integer("topk_group", 1),
            bias_name="gate.e_score_correction_bias",
        ),
    )
