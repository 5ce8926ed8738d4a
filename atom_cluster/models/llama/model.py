"""Stop 11 of 14: the Llama family (Llama 2 and 3, Qwen2, Qwen3): pre-norm decoder with rotary positions and gated MLP.

What differs between members is in `ModelSpec`: biases, query/key norms, head size, kind of rotary embedding, tied
embeddings. Knows nothing of requests, blocks or sampling. Next: layers/attention.py, layers/mlp.py, and ops/ below.
Shape suffixes: T tokens, D hidden dims, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.layers.attention import Attention, AttentionInputs, AttentionSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import Embedding, VocabularyShard
from atom_cluster.layers.forward_batch import ForwardBatch, KvLayerCache
from atom_cluster.layers.logits import LogitsHead
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.llama.weights import llama_checkpoint_map
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.linear import LinearOp
from atom_cluster.weights.rules import CheckpointMap


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, spec: ModelSpec, context: LayerContext) -> None:
        self.attention_norm = RmsNorm(context, size=spec.hidden_size, eps=spec.norm_eps)
        self.attention = Attention(
            context,
            AttentionSpec(
                hidden_size=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                has_qkv_bias=spec.has_qkv_bias,
                has_output_bias=spec.has_attention_output_bias,
                qk_norm_eps=spec.norm_eps if spec.has_qk_norm else None,
            ),
        )
        self.mlp_norm = RmsNorm(context, size=spec.hidden_size, eps=spec.norm_eps)
        self.mlp = GatedMlp(
            context,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            has_bias=spec.has_mlp_bias,
        )

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        self.attention.finish_loading()
        self.mlp.finish_loading()

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: AttentionInputs, kv: KvLayerCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        x_TD, residual_TD = self.attention_norm.add(x_TD, residual_TD)
        x_TD = self.attention(x_TD, inputs, kv)
        x_TD, residual_TD = self.mlp_norm.add(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


class LlamaForCausalLM:
    """A whole model of the family, this rank's shard of it."""

    def __init__(self, spec: ModelSpec, context: LayerContext, *, max_model_len: int) -> None:
        self.spec = spec
        self._context = context
        self.embedding = Embedding(context, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size)
        self.layers = tuple(DecoderLayer(spec, context) for _ in range(spec.num_layers))
        self.norm = RmsNorm(context, size=spec.hidden_size, eps=spec.norm_eps)
        self.head = LogitsHead(
            context,
            self.embedding.shard
            if spec.has_tied_embeddings
            else VocabularyShard(context, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size),
        )
        self._rotary = RotaryTable(spec.rope, num_positions=max_model_len, dtype=context.dtype, device=context.device)

    @property
    def kv_layout(self) -> KvLayout:
        """KV sizes of this rank's layers."""
        head_dim = self.spec.head_dim
        layers = tuple(
            KvLayerLayout(num_kv_heads=layer.attention.num_kv_heads, key_dim=head_dim, value_dim=head_dim)
            for layer in self.layers
        )
        return KvLayout(layers=layers, dtype=str(self._context.dtype).removeprefix("torch."))

    @property
    def vocab_size(self) -> int:
        """Size of the full vocabulary, over all ranks."""
        return self.spec.vocab_size

    @property
    def linear_ops(self) -> tuple[LinearOp, ...]:
        """Every matrix product of the model, prepared."""
        layers = (
            op
            for layer in self.layers
            for op in (layer.attention.qkv.op, layer.attention.output.op, layer.mlp.gate_up.op, layer.mlp.down.op)
        )
        return (*layers, self.head.op)

    def checkpoint_map(self) -> CheckpointMap:
        """Where checkpoint tensors go. Valid until `finish_loading`."""
        return llama_checkpoint_map(self)

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend, layer by layer to keep the peak of memory low."""
        for layer in self.layers:
            layer.finish_loading()
        self.head.finish_loading()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]; writes the step's KV into `batch.kv`."""
        cos_T1P, sin_T1P = self._rotary.at(batch.positions)
        inputs = AttentionInputs(self._context.ops.plan_attention(batch.attention), cos_T1P, sin_T1P)
        x_TD = self.embedding(batch.token_ids)
        residual_TD = torch.zeros_like(x_TD)
        for layer, kv in zip(self.layers, batch.kv, strict=True):
            x_TD, residual_TD = layer(x_TD, residual_TD, inputs, kv)
        return self.norm.add(x_TD, residual_TD)[0]

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor | None:
        """Logits over the full vocabulary, [S, V] float32; None on ranks other than 0 (they took part in gathering)."""
        return self.head(hidden_SD)
