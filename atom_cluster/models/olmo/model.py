"""OLMo 2 and 3: norms behind attention and MLP instead of before them, and over whole queries and keys.

Knows nothing of requests, blocks or sampling. Shape suffixes: T tokens, D hidden dims.
"""

from __future__ import annotations

import torch

from atom_cluster.layers.attention import Attention, AttentionSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.module import Module
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.layer_types import keeps_all
from atom_cluster.models.olmo.spec import OlmoSpec


class OlmoLayer(Module):
    """Attention and MLP; each one's output is normed and added to the residual stream."""

    def __init__(self, spec: OlmoSpec, index: int, context: LayerContext, rotary: RotaryTable) -> None:
        self.attention = Attention(
            context.at("self_attn"),
            AttentionSpec(
                hidden_size=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                has_qkv_bias=spec.has_attention_bias,
                has_output_bias=spec.has_attention_bias,
                qk_norm="projection",
                norm_eps=spec.norm_eps,
                window=spec.windows[index],
                keeps_all=keeps_all(spec.windows, index),
            ),
            rotary,
        )
        self.attention_norm = RmsNorm(context.at("post_attention_layernorm"), size=spec.hidden_size, eps=spec.norm_eps)
        self.mlp = GatedMlp(context.at("mlp"), hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size)
        self.mlp_norm = RmsNorm(context.at("post_feedforward_layernorm"), size=spec.hidden_size, eps=spec.norm_eps)

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        stream_TD = residual_TD + x_TD
        stream_TD = stream_TD + self.attention_norm(self.attention(stream_TD, inputs))
        return self.mlp_norm(self.mlp(stream_TD)), stream_TD


class OlmoForCausalLM(DecoderModel[OlmoSpec]):
    """A whole model, this rank's shard of it."""

    def build_layer(self, index: int, context: LayerContext) -> OlmoLayer:
        """Layers differ in their windows, and with them in their rotary embedding."""
        rope = self.spec.rope if self.spec.windows[index] is None else self.spec.local_rope
        return OlmoLayer(self.spec, index, context, self.rotary(rope))
