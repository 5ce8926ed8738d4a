"""gpt-oss: attention with sinks, every other layer with a window, and experts in every layer.

Knows nothing of requests, blocks or sampling.
"""

from __future__ import annotations

from dataclasses import replace

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.gpt_oss.spec import GptOssSpec
from atom_cluster.models.layer_types import keeps_all
from atom_cluster.models.pre_norm_layer import PreNormLayer


class GptOssForCausalLM(DecoderModel):
    """A whole model, this rank's shard of it."""

    def __init__(
        self, spec: GptOssSpec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._gpt_oss = spec
        self._rotary = RotaryTable(spec.rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """Layers differ in their windows."""
        spec = self._gpt_oss
        attention = replace(spec.attention, window=spec.windows[index], keeps_all=keeps_all(spec.windows, index))
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=Attention(context.at("self_attn"), attention, self._rotary),
            mlp=SparseMoe(context.at("mlp"), spec.moe),
        )
