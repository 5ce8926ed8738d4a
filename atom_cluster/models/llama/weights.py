"""Names that tensors of the Llama family have in HF checkpoints. Knows no files and no shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.rules import CheckpointMap

if TYPE_CHECKING:
    from atom_cluster.models.llama.model import LlamaForCausalLM

_DERIVED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
_HEAD = r"lm_head\.weight"


def llama_checkpoint_map(model: LlamaForCausalLM) -> CheckpointMap:
    """All tensors of the model. With tied embeddings a head in the checkpoint is a copy, and ignored."""
    parts: dict[str, WeightPart] = {}
    parts.update(model.embedding.shard.weight_parts("model.embed_tokens"))
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        parts.update(layer.attention_norm.weight_parts(f"{prefix}.input_layernorm"))
        parts.update(layer.attention.weight_parts(f"{prefix}.self_attn"))
        parts.update(layer.mlp_norm.weight_parts(f"{prefix}.post_attention_layernorm"))
        parts.update(layer.mlp.weight_parts(f"{prefix}.mlp"))
    parts.update(model.norm.weight_parts("model.norm"))
    if model.spec.has_tied_embeddings:
        return CheckpointMap(parts=parts, ignored=(_DERIVED, _HEAD))
    parts.update(model.head.weight_parts("lm_head"))
    return CheckpointMap(parts=parts, ignored=(_DERIVED,))
