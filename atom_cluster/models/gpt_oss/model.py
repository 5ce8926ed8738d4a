"""gpt-oss: attention with sinks, every other layer with a window, and experts in every layer.

Knows nothing of requests, blocks or sampling.
"""

from __future__ import annotations

from dataclasses import replace

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.gpt_oss.spec import GptOssSpec
from atom_cluster.models.layer_types import keeps_all
from atom_cluster.models.pre_norm_layer import PreNormLayer


class GptOssForCausalLM(DecoderModel[GptOssSpec]):
    """A whole model, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """Layers differ in their windows."""
        spec = self.spec
        attention = replace(spec.attention, window=spec.windows[index], keeps_all=keeps_all(spec.windows, index))
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=Attention(context.at("self_attn"), attention, self.rotary(spec.rope)),
            mlp=SparseMoe(context.at("mlp"), spec.moe),
        )
