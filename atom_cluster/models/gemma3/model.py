"""Gemma 3: norms before and after attention and MLP, five layers with a window to one without, scaled embeddings.

Knows nothing of images, requests, blocks or sampling. Shape suffixes: T tokens, D hidden dims.
"""

from __future__ import annotations

import torch

from atom_cluster.layers.attention import Attention, AttentionSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import Embedding
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.module import Module
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.gemma3.spec import Gemma3Spec
from atom_cluster.models.layer_types import keeps_all


class Gemma3Layer(Module):
    """Attention and MLP, each between two norms and added to the residual stream."""

    def __init__(self, spec: Gemma3Spec, index: int, context: LayerContext, rotary: RotaryTable) -> None:
        def norm(name: str) -> RmsNorm:
            return RmsNorm(context.at(name), size=spec.hidden_size, eps=spec.norm_eps, is_offset=True)

        self.attention_norm = norm("input_layernorm")
        self.attention = Attention(
            context.at("self_attn"),
            AttentionSpec(
                hidden_size=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=spec.query_scale,
                qk_norm="head",
                norm_eps=spec.norm_eps,
                is_norm_offset=True,
                window=spec.windows[index],
                keeps_all=keeps_all(spec.windows, index),
            ),
            rotary,
        )
        self.attention_output_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = GatedMlp(
            context.at("mlp"),
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            activation=context.ops.gelu_tanh_and_mul,
        )
        self.mlp_output_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        x_TD, residual_TD = self.attention_norm.add(x_TD, residual_TD)
        x_TD = self.attention_output_norm(self.attention(x_TD, inputs))
        x_TD, residual_TD = self.mlp_norm.add(x_TD, residual_TD)
        return self.mlp_output_norm(self.mlp(x_TD)), residual_TD


class Gemma3ForCausalLM(DecoderModel):
    """A whole model, this rank's shard of it."""

    def __init__(
        self, spec: Gemma3Spec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._gemma = spec

        def tabulate(rope: RopeSpec) -> RotaryTable:
            return RotaryTable(rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)

        self._rotary, self._local_rotary = tabulate(spec.rope), tabulate(spec.local_rope)
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)

    def build_embedding(self, context: LayerContext) -> Embedding:
        """Rows are multiplied by the root of their size, rounded to the dtype of activations."""
        size = self.spec.hidden_size
        factor = torch.tensor(size**0.5, dtype=context.dtype).item()
        return Embedding(context, vocab_size=self.spec.vocab_size, hidden_size=size, factor=factor)

    def build_norm(self, context: LayerContext) -> RmsNorm:
        """The norm behind the last layer."""
        return RmsNorm(context, size=self.spec.hidden_size, eps=self.spec.norm_eps, is_offset=True)

    def build_layer(self, index: int, context: LayerContext) -> Gemma3Layer:
        """Layers differ in their windows, and with them in their rotary embedding."""
        rotary = self._rotary if self._gemma.windows[index] is None else self._local_rotary
        return Gemma3Layer(self._gemma, index, context, rotary)


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of a model that also sees."""

    prefix = "language_model.model"
    head_name = "language_model.lm_head"
    ignored = (r"vision_tower\..*", r"multi_modal_projector\..*")
