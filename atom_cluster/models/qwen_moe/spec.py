"""Reads the configuration of Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B) and Qwen3-MoE. Knows no tensors."""

from __future__ import annotations

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec, read_num_experts, refuse_unsupported
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import common_fields


def read_qwen_moe_spec(config: HfConfig) -> MoeDecoderSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    refuse_unsupported(config)
    is_qwen2 = config.architecture.startswith("Qwen2")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    rope = read_rope(config, head_dim)
    attention = AttentionSpec(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        has_qkv_bias=config.flag("qkv_bias", default=True) if is_qwen2 else config.flag("attention_bias"),
        has_output_bias=not is_qwen2 and config.flag("attention_bias"),
        qk_norm=None if is_qwen2 else "head",
        norm_eps=config.number("rms_norm_eps", 1e-6),
    )
    dense_layers = _layers_without_experts(config)
    return MoeDecoderSpec(
        **common_fields(config),
        attention=attention,
        rope=rope,
        moe=_read_moe(config, has_shared_expert=is_qwen2),
        dense_layers=dense_layers,
        dense_size=config.integer("intermediate_size") if dense_layers else None,
    )


def _read_moe(config: HfConfig, *, has_shared_expert: bool) -> MoeSpec:
    return MoeSpec(
        hidden_size=config.integer("hidden_size"),
        num_experts=read_num_experts(config),
        expert_size=config.integer("moe_intermediate_size"),
        router=RouterSpec(
            experts_per_token=config.integer("num_experts_per_tok"), renormalize=config.flag("norm_topk_prob")
        ),
        shared_size=config.integer("shared_expert_intermediate_size") if has_shared_expert else None,
        shared_name="shared_expert",
        shared_gate_name="shared_expert_gate" if has_shared_expert else None,
    )


def _layers_without_experts(config: HfConfig) -> frozenset[int]:
    step = config.integer("decoder_sparse_step", 1)
    layers = range(config.integer("num_hidden_layers"))
    return frozenset(config.integers("mlp_only_layers")) | {index for index in layers if (index + 1) % step != 0}
