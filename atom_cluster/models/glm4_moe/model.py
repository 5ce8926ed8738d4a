"""GLM-4-MoE: a decoder of grouped-query attention and experts, with a layer that drafts the token after next."""

from __future__ import annotations

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.mtp import MtpLayer, MtpSpec
from atom_cluster.models.appended_mtp import unused_names
from atom_cluster.models.moe_decoder.model import MoeDecoderForCausalLM
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec


class Glm4MoeForCausalLM(MoeDecoderForCausalLM):
    """A whole model, this rank's shard of it."""

    def __init__(
        self, spec: MoeDecoderSpec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)
        self.ignored = unused_names(
            "model.layers", num_layers=spec.num_layers, num_stored=spec.num_draft_layers, num_built=num_draft_layers
        )

    def build_draft_layer(self, index: int) -> MtpLayer:
        """A layer with experts behind the main ones."""
        spec, number = self.spec, self.spec.num_layers + index
        context = self.context.at(f"model.layers.{number}")
        block = self.build_layer(number, context)
        return MtpLayer(context, MtpSpec(hidden_size=spec.hidden_size, norm_eps=spec.norm_eps), block, self.head)
