"""Stop 11 of 14: DeepSeek-V2, V3 (R1, Kimi-K2), V3.2, GLM-4.7-Flash, GLM-5: a decoder of latent attention and experts.

What differs between members is in `DeepseekSpec`: routers, which layers have experts, sparse attention. Knows nothing
of requests, blocks or sampling. Next: layers/mla.py, layers/indexer.py, layers/moe.py.
"""

from __future__ import annotations

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mla import MlaAttention
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.layers.mtp import MtpLayer, MtpSpec
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.appended_mtp import unused_names
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.deepseek.spec import DeepseekSpec
from atom_cluster.models.pre_norm_layer import PreNormLayer


class DeepseekForCausalLM(DecoderModel):
    """A whole model of the family, this rank's shard of it."""

    def __init__(
        self, spec: DeepseekSpec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._deepseek = spec
        self._rotary = RotaryTable(spec.rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)
        self.ignored = unused_names(
            "model.layers", num_layers=spec.num_layers, num_stored=spec.num_draft_layers, num_built=num_draft_layers
        )

    def build_layer(self, index: int, context: LayerContext) -> PreNormLayer:
        """Layers differ in what follows attention, and in whose selection of positions they attend to."""
        spec = self._deepseek
        mlp = context.at("mlp")
        return PreNormLayer(
            context,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            attention=MlaAttention(context.at("self_attn"), spec.attention, self._rotary, spec.selections[index]),
            mlp=GatedMlp(mlp, hidden_size=spec.hidden_size, intermediate_size=spec.dense_size)
            if index in spec.dense_layers
            else SparseMoe(mlp, spec.moe),
        )

    def build_draft_layer(self, index: int) -> MtpLayer:
        """A layer like the main ones, behind them."""
        spec, number = self.spec, self.spec.num_layers + index
        context = self.context.at(f"model.layers.{number}")
        block = self.build_layer(number, context)
        return MtpLayer(context, MtpSpec(hidden_size=spec.hidden_size, norm_eps=spec.norm_eps), block, self.head)
