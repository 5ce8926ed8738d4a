"""MiMo-V2-Flash: a decoder of experts; most layers see a window, with sinks, and have KV heads of their own number.

Knows nothing of requests, blocks or sampling.
"""

from __future__ import annotations

from atom_cluster.layers.attention import Attention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.mimo_v2.draft import MimoDraftLayer
from atom_cluster.models.mimo_v2.spec import MimoV2Spec
from atom_cluster.models.pre_norm_layer import PreNormLayer

_DRAFT_NAME = "model.mtp"


class MimoV2ForCausalLM(DecoderModel):
    """A whole model, this rank's shard of it."""

    def __init__(
        self, spec: MimoV2Spec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._mimo = spec

        def tabulate(rope: RopeSpec) -> RotaryTable:
            return RotaryTable(rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)

        self._rotary, self._local_rotary = tabulate(spec.rope), tabulate(spec.local_rope)
        built = "|".join(map(str, range(num_draft_layers)))
        self.ignored = (rf"{_DRAFT_NAME}\.layers\.(?!({built})\.).*",)
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """With a window or without, with experts or a gated MLP."""
        spec = self._mimo
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
        spec, context = self._mimo, self.context.at(f"{_DRAFT_NAME}.layers.{index}")
        block = PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=self._local_attention(context),
            mlp=self._dense_mlp(context.at("mlp")),
            mlp_norm_name="pre_mlp_layernorm",
        )
        return MimoDraftLayer(context, spec=spec, block=block, head=self.head)

    def _full_attention(self, context: LayerContext) -> Attention:
        return Attention(context.at("self_attn"), self._mimo.full_attention, self._rotary)

    def _local_attention(self, context: LayerContext) -> Attention:
        return Attention(context.at("self_attn"), self._mimo.local_attention, self._local_rotary)

    def _dense_mlp(self, context: LayerContext) -> GatedMlp:
        return GatedMlp(context, hidden_size=self._mimo.hidden_size, intermediate_size=self._mimo.dense_size)
