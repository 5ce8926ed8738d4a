"""Reads the configuration of Qwen3.5, dense and with experts: alone, or in the `text_config` of a multimodal model.

Text has equal positions on all axes of the multimodal rotary embedding, which then is the plain one.
"""

from __future__ import annotations

from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.qwen3_next.spec import HybridSpec, read_hybrid_spec, read_moe


def read_qwen3_5_spec(config: HfConfig) -> HybridSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config = config.language_model()
    has_experts = config.architecture.startswith("Qwen3_5Moe")
    return read_hybrid_spec(
        config,
        is_grouped=False,
        moe=read_moe(config, renormalize=True) if has_experts else None,
        dense_layers=frozenset(() if has_experts else range(config.integer("num_hidden_layers"))),
        num_draft_layers=config.integer("mtp_num_hidden_layers", 0, least=0),
    )
