"""DeepSeek-V4: a decoder on several residual streams, whose attention sees a window and compressed entries before it.

Knows nothing of requests, blocks or sampling. Next: layers/compressed_attention.py, layers/compressor.py,
layers/hyper_connection.py. Shape suffixes: T tokens, N streams, D hidden dims.
"""

from __future__ import annotations

from typing import cast

import torch

from atom_cluster.layers.compressed_attention import CompressedAttention
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.hyper_connection import HyperConnection, JoinedStreams
from atom_cluster.layers.module import Module
from atom_cluster.layers.moe import SparseMoe
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.models.decoder import DecoderModel
from atom_cluster.models.deepseek_v4.spec import DeepseekV4Spec


class DeepseekV4ForCausalLM(DecoderModel[DeepseekV4Spec]):
    """A whole model, this rank's shard of it.

    What transformers saves has a prefix and a few other names than the checkpoints of the model's makers.
    """

    prefix = ""
    embedding_name = "embed"
    head_name = "head"

    def __init__(
        self, spec: DeepseekV4Spec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
    ) -> None:
        self._is_resaved = "model.embed_tokens.weight" in context.stored_dtypes
        if self._is_resaved:
            self.prefix, self.embedding_name = "model", "embed_tokens"
        super().__init__(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)
        joined = context.at("model.hc_head.hc" if self._is_resaved else "hc_head")
        self.joined = JoinedStreams(joined, spec.streams)

    def build_layer(self, index: int, context: LayerContext) -> HyperLayer:
        """Layers differ in what attention sees of the past, and in how experts are chosen."""
        spec = self.spec
        attention = spec.attentions[index]
        return HyperLayer(
            context,
            spec,
            attention=CompressedAttention(
                context.at("attn"),
                attention,
                self.rotary(spec.window_rope if attention.compressor is None else spec.compressed_rope),
                key_norm_name="norm" if self._is_resaved else "kv_norm",
            ),
            moe=SparseMoe(context.at("ffn"), spec.moes[index]),
        )

    def ignored_names(self) -> tuple[str, ...]:
        """Layers for drafting, which are not built."""
        return (r"(model\.)?mtp\..*",)

    def build_norm(self, context: LayerContext) -> RmsNorm:
        """The norm behind the last layer."""
        return RmsNorm(context, size=self.spec.hidden_size, eps=self.spec.norm_eps, is_wide=True)

    def run_layers(self, x_TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """All streams begin as the embedding, and are joined behind the last layer."""
        streams_TND = x_TD[:, None].repeat(1, self.spec.streams.num_streams, 1)
        for layer in self.layers:
            streams_TND = cast("HyperLayer", layer)(streams_TND, inputs)
        return self.norm(self.joined(streams_TND))


class HyperLayer(Module):
    """Attention and experts, each behind a norm, between streams."""

    def __init__(
        self, context: LayerContext, spec: DeepseekV4Spec, *, attention: CompressedAttention, moe: SparseMoe
    ) -> None:
        def norm(name: str) -> RmsNorm:
            return RmsNorm(context.at(name), size=spec.hidden_size, eps=spec.norm_eps, is_wide=True)

        self.attention_streams = HyperConnection(context.at("hc_attn"), spec.streams)
        self.attention_norm = norm("attn_norm")
        self.attention = attention
        self.moe_streams = HyperConnection(context.at("hc_ffn"), spec.streams)
        self.moe_norm = norm("ffn_norm")
        self.moe = moe

    def __call__(self, streams_TND: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, N, D] -> [T, N, D]"""
        x_TD, write_TN, mix_TNN = self.attention_streams.read(streams_TND)
        x_TD = self.attention(self.attention_norm(x_TD), inputs)
        streams_TND = self.attention_streams.write(streams_TND, x_TD, write_TN, mix_TNN)
        x_TD, write_TN, mix_TNN = self.moe_streams.read(streams_TND)
        x_TD = self.moe(self.moe_norm(x_TD), inputs.batch.token_ids)
        return self.moe_streams.write(streams_TND, x_TD, write_TN, mix_TNN)
