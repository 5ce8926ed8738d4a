"""Qwen3-Next: most layers have linear attention (Gated DeltaNet), every fourth has gated full attention.

All norms are offset: their stored weights are what is added to one.
"""

from __future__ import annotations

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.gated_delta_net import GatedDeltaNet
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.layers.mtp import MtpLayer, MtpSpec
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.pre_norm_layer import PreNormLayer
from atom_cluster.models.qwen3_next.spec import HybridSpec

_DRAFT_NAME = "mtp"


class Qwen3NextForCausalLM(DecoderModel[HybridSpec]):
    """A whole model of the family, this rank's shard of it."""

    def build_norm(self, context: LayerContext) -> RmsNorm:
        """The norm behind the last layer."""
        return RmsNorm(context, size=self.spec.hidden_size, eps=self.spec.norm_eps, is_offset=True)

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """A layer with the attention and the MLP that the spec says."""
        spec = self.spec
        attention = (
            GatedDeltaNet(context.at("linear_attn"), spec.linear_attention)
            if index in spec.linear_layers
            else self._full_attention(context)
        )
        return self._layer(context, attention, is_dense=index in spec.dense_layers)

    def build_draft_layer(self, index: int) -> MtpLayer:
        """The one layer that drafts: full attention, and experts if the model has any."""
        context = self.context.at(_DRAFT_NAME)
        inner = context.at("layers.0")
        block = self._layer(inner, self._full_attention(inner), is_dense=self.spec.moe is None)
        spec = MtpSpec(
            hidden_size=self.spec.hidden_size,
            norm_eps=self.spec.norm_eps,
            is_norm_offset=True,
            embedding_norm="pre_fc_norm_embedding",
            hidden_norm="pre_fc_norm_hidden",
            projection="fc",
            output_norm="norm",
        )
        return MtpLayer(context, spec, block, self.head)

    def ignored_names(self) -> tuple[str, ...]:
        """The layer that drafts, if it was not built."""
        return () if self.num_draft_layers else (rf"{_DRAFT_NAME}\..*",)

    def _full_attention(self, context: LayerContext) -> Attention:
        return Attention(context.at("self_attn"), self.spec.attention, self.rotary(self.spec.rope))

    def _layer(self, context: LayerContext, attention: Attention | GatedDeltaNet, *, is_dense: bool) -> PreNormLayer:
        return PreNormLayer(
            context,
            hidden_size=self.spec.hidden_size,
            norm_eps=self.spec.norm_eps,
            is_norm_offset=True,
            attention=attention,
            mlp=self._mlp(context.at("mlp"), is_dense=is_dense),
        )

    def _mlp(self, context: LayerContext, *, is_dense: bool) -> GatedMlp | SparseMoe:
        spec = self.spec
        if not is_dense and spec.moe is not None:
            return SparseMoe(context, spec.moe)
        if spec.dense_size is None:
            raise AssertionError(f"{context.name} has no experts, and no size for anything else")
        return GatedMlp(context, hidden_size=spec.hidden_size, intermediate_size=spec.dense_size)
