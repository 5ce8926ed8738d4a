"""A decoder of grouped-query attention and experts: Qwen2-MoE, Qwen3-MoE, Mixtral, MiniMax-M2, GLM-4-MoE.

The spec, which each family reads from its configuration, says in what they differ.
"""

from __future__ import annotations

from dataclasses import replace

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec
from atom_cluster.models.pre_norm_layer import PreNormLayer


class MoeDecoderForCausalLM(DecoderModel[MoeDecoderSpec]):
    """A whole model of one of the families, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """A layer with experts, or with a gated MLP where the spec says so."""
        spec = self.spec
        attention = replace(spec.attention, keeps_all=index == 0 and spec.attention.window is not None)
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=Attention(context.at("self_attn"), attention, self.rotary(spec.rope)),
            mlp=self._build_mlp(index, context),
        )

    def _build_mlp(self, index: int, context: LayerContext) -> GatedMlp | SparseMoe:
        spec = self.spec
        if index not in spec.dense_layers:
            return SparseMoe(context.at(spec.moe_name), spec.moe)
        if spec.dense_size is None:
            raise AssertionError(f"layer {index} has no experts, and no size for anything else")
        return GatedMlp(context.at("mlp"), hidden_size=spec.hidden_size, intermediate_size=spec.dense_size)
