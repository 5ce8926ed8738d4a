"""Reads the configuration of MiniMax-M2. Knows no tensors."""

from __future__ import annotations

from atom_cluster.layers.attention import AttentionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec, read_num_experts, refuse_unsupported
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import common_fields


def read_minimax_m2_spec(config: HfConfig) -> MoeDecoderSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    refuse_unsupported(config)
    config.require("scoring_func", "sigmoid", default="sigmoid")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", 128)
    rotary_dim = config.integer("rotary_dim", head_dim)
    rope = read_rope(config, head_dim, default_theta=5e6, default_partial=rotary_dim / head_dim)
    return MoeDecoderSpec(
        **common_fields(config),
        attention=AttentionSpec(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=config.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            qk_norm="projection",
            norm_eps=config.number("rms_norm_eps", 1e-6),
        ),
        rope=rope,
        moe=MoeSpec(
            hidden_size=hidden_size,
            num_experts=read_num_experts(config),
            expert_size=config.integer("intermediate_size"),
            router=RouterSpec(
                experts_per_token=config.integer("num_experts_per_tok"),
                score="sigmoid",
                renormalize=True,
                bias_name="e_score_correction_bias",
            ),
            projection_names=("w1", "w3", "w2"),
        ),
        moe_name="block_sparse_moe",
    )
