"""DeepSeek-V2, V3 (R1, Kimi-K2), V3.2, GLM-4.7-Flash, GLM-5: a decoder of latent attention and experts.

What differs between members is in `DeepseekSpec`: routers, which layers have experts, sparse attention. Knows nothing
of requests, blocks or sampling. Next: layers/mla.py, layers/indexer.py, layers/moe.py.
"""

from __future__ import annotations

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mla import MlaAttention
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.models.appended_mtp import AppendedMtpModel
from atom_cluster.models.deepseek.spec import DeepseekSpec
from atom_cluster.models.pre_norm_layer import PreNormLayer


class DeepseekForCausalLM(AppendedMtpModel[DeepseekSpec]):
    """A whole model of the family, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """Layers differ in what follows attention, and in whose selection of positions they attend to."""
        spec = self.spec
        mlp, rotary = context.at("mlp"), self.rotary(spec.rope)
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=MlaAttention(context.at("self_attn"), spec.attention, rotary, spec.selections[index]),
            mlp=GatedMlp(mlp, hidden_size=spec.hidden_size, intermediate_size=spec.dense_size)
            if index in spec.dense_layers
            else SparseMoe(mlp, spec.moe),
        )
