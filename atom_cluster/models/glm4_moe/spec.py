"""Reads the configuration of GLM-4.5, GLM-4.5-Air and GLM-4.6. Knows no tensors."""

from __future__ import annotations

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.appended_mtp import read_num_appended_layers
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec, read_num_experts, refuse_unsupported
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import common_fields


def read_glm4_moe_spec(config: HfConfig) -> MoeDecoderSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    refuse_unsupported(config)
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    rope = read_rope(config, head_dim, default_partial=0.5)
    return MoeDecoderSpec(
        **common_fields(config),
        num_draft_layers=read_num_appended_layers(config),
        attention=AttentionSpec(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=config.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            has_qkv_bias=config.flag("attention_bias"),
            qk_norm="head" if config.flag("use_qk_norm") else None,
            norm_eps=config.number("rms_norm_eps", 1e-5),
        ),
        rope=rope,
        moe=_read_moe(config),
        dense_layers=frozenset(range(config.integer("first_k_dense_replace", 1, least=0))),
        dense_size=config.integer("intermediate_size"),
    )


def _read_moe(config: HfConfig) -> MoeSpec:
    expert_size = config.integer("moe_intermediate_size")
    num_shared = config.integer("n_shared_experts", 1, least=0)
    return MoeSpec(
        hidden_size=config.integer("hidden_size"),
        num_experts=read_num_experts(config),
        expert_size=expert_size,
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
        shared_size=expert_size * num_shared if num_shared else None,
    )
