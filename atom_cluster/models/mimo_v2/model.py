"""MiMo-V2-Flash: a decoder of experts; most layers see a window, with sinks, and have KV heads of their own number.

Knows nothing of requests, blocks or sampling.
"""

from __future__ import annotations

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.mimo_v2.draft import MimoDraftLayer
from atom_cluster.models.mimo_v2.spec import MimoV2Spec
from atom_cluster.models.pre_norm_layer import PreNormLayer

_DRAFT_NAME = "model.mtp"


class MimoV2ForCausalLM(DecoderModel[MimoV2Spec]):
    """A whole model, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """With a window or without, with experts or a gated MLP."""
        spec = self.spec
        is_local = spec.windows[index] is not None
        is_dense = index in spec.dense_layers
        mlp = self._dense_mlp(context.at("mlp")) if is_dense else SparseMoe(context.at("mlp"), spec.moe)
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=self._local_attention(context) if is_local else self._full_attention(context),
            mlp=mlp,
        )

    def build_draft_layer(self, index: int) -> MimoDraftLayer:
        """Its block has a window and a gated MLP."""
        spec, context = self.spec, self.context.at(f"{_DRAFT_NAME}.layers.{index}")
        block = PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=self._local_attention(context),
            mlp=self._dense_mlp(context.at("mlp")),
            mlp_norm_name="pre_mlp_layernorm",
        )
        return MimoDraftLayer(context, spec=spec, block=block, head=self.head)

    def ignored_names(self) -> tuple[str, ...]:
        """Layers for drafting that were not built."""
        built = "|".join(map(str, range(self.num_draft_layers)))
        return (rf"{_DRAFT_NAME}\.layers\.(?!({built})\.).*",)

    def _full_attention(self, context: LayerContext) -> Attention:
        return Attention(context.at("self_attn"), self.spec.full_attention, self.rotary(self.spec.rope))

    def _local_attention(self, context: LayerContext) -> Attention:
        return Attention(context.at("self_attn"), self.spec.local_attention, self.rotary(self.spec.local_rope))

    def _dense_mlp(self, context: LayerContext) -> GatedMlp:
        return GatedMlp(context, hidden_size=self.spec.hidden_size, intermediate_size=self.spec.dense_size)
