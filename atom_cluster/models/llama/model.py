"""Stop 11 of 14: the Llama family (Llama, Mistral, Qwen2, Qwen3): pre-norm decoder with rotary positions and gated MLP.

What differs between members is in `LlamaSpec`: biases, query/key norms, windows, head size, kind of rotary embedding,
tied embeddings. Knows nothing of requests, blocks or sampling. Next: models/pre_norm_layer.py, then
layers/attention.py, layers/mlp.py, and ops/ below.
"""

from __future__ import annotations

from atom_cluster.layers.attention import Attention, AttentionSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.layer_types import keeps_all
from atom_cluster.models.llama.spec import LlamaSpec
from atom_cluster.models.pre_norm_layer import PreNormLayer


class LlamaForCausalLM(DecoderModel[LlamaSpec]):
    """A whole model of the family, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """Layers differ in their windows."""
        spec = self.spec
        attention = AttentionSpec(
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            has_qkv_bias=spec.has_qkv_bias,
            has_output_bias=spec.has_attention_output_bias,
            qk_norm="head" if spec.has_qk_norm else None,
            norm_eps=spec.norm_eps,
            window=spec.windows[index],
            keeps_all=keeps_all(spec.windows, index),
        )
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=Attention(context.at("self_attn"), attention, self.rotary(spec.rope)),
            mlp=GatedMlp(
                context.at("mlp"),
                hidden_size=spec.hidden_size,
                intermediate_size=spec.intermediate_size,
                has_bias=spec.has_mlp_bias,
            ),
        )
