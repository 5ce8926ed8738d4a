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


class Gemma3ForCausalLM(DecoderModel[Gemma3Spec]):
    """A whole model, this rank's shard of it."""

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
        rope = self.spec.rope if self.spec.windows[index] is None else self.spec.local_rope
        return Gemma3Layer(self.spec, index, context, self.rotary(rope))


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of a model that also sees."""

    prefix = "language_model.model"
    head_name = "language_model.lm_head"

    def ignored_names(self) -> tuple[str, ...]:
        """What sees."""
        return (r"vision_tower\..*", r"multi_modal_projector\..*")
