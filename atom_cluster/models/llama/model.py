"""Stop 11 of 14: the Llama family (Llama 2 and 3, Qwen2, Qwen3): pre-norm decoder with rotary positions and gated MLP.

What differs between members is in `LlamaSpec`: biases, query/key norms, head size, kind of rotary embedding, tied
embeddings. Knows nothing of requests, blocks or sampling. Next: layers/attention.py, layers/mlp.py, and ops/ below.
Shape suffixes: T tokens, D hidden dims.
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
from atom_cluster.models.llama.spec import LlamaSpec


class LlamaLayer(Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, spec: LlamaSpec, context: LayerContext, rotary: RotaryTable) -> None:
        self.attention_norm = RmsNorm(context.at("input_layernorm"), size=spec.hidden_size, eps=spec.norm_eps)
        self.attention = Attention(
            context.at("self_attn"),
            AttentionSpec(
                hidden_size=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                has_qkv_bias=spec.has_qkv_bias,
                has_output_bias=spec.has_attention_output_bias,
                qk_norm="head" if spec.has_qk_norm else None,
                norm_eps=spec.norm_eps,
            ),
            rotary,
        )
        self.mlp_norm = RmsNorm(context.at("post_attention_layernorm"), size=spec.hidden_size, eps=spec.norm_eps)
        self.mlp = GatedMlp(
            context.at("mlp"),
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            has_bias=spec.has_mlp_bias,
        )

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        x_TD, residual_TD = self.attention_norm.add(x_TD, residual_TD)
        x_TD = self.attention(x_TD, inputs)
        x_TD, residual_TD = self.mlp_norm.add(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


class LlamaForCausalLM(DecoderModel):
    """A whole model of the family, this rank's shard of it."""

    def __init__(
        self, spec: LlamaSpec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._llama = spec
        self._rotary = RotaryTable(spec.rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)

    def build_layer(self, index: int, context: LayerContext) -> LlamaLayer:
        """All layers are alike."""
        return LlamaLayer(self._llama, context, self._rotary)
