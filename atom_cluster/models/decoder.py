"""DecoderModel: what decoder-only models have in common around their layers. A family says what a layer is.

Embedding, a stack of layers on a residual stream, a norm, a head over the vocabulary; and behind them, if asked for,
the layers that draft further tokens. Knows no family, no requests, blocks or sampling.
Shape suffixes: T tokens, D hidden dims, S sampled rows, V vocabulary.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar, cast

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import Embedding, VocabularyShard
from atom_cluster.layers.forward_batch import ForwardBatch, LayerInputs
from atom_cluster.layers.logits import Logits, LogitsHead
from atom_cluster.layers.module import Module, number_caches
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.models.spec import ModelSpec
from atom_cluster.weights.rules import CheckpointMap

S = TypeVar("S", bound=ModelSpec)

_DERIVED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


class DecoderLayer(Protocol):
    """One layer of a model. Also a `Module`."""

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        ...


class DraftLayer(Protocol):
    """A layer that drafts the token after next. Also a `Module`."""

    def __call__(self, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """(embedding of each token's successor, hidden state of each token) -> hidden state for drafting, [T, D]."""
        ...

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S samples, from what `__call__` returned."""
        ...


class DecoderModel(Module, Generic[S]):
    """A whole model, this rank's shard of it. Subclasses build layers, and tell names that a checkpoint may have."""

    prefix = "model"
    """Name in checkpoints of everything but the head."""
    embedding_name = "embed_tokens"
    head_name = "lm_head"

    def __init__(self, spec: S, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0) -> None:
        """num_draft_layers: how many of the checkpoint's layers for drafting to build, from the first."""
        if num_draft_layers > spec.num_draft_layers:
            raise ConfigError(
                f"{num_draft_layers} layers for drafting are wanted, the model has {spec.num_draft_layers}"
            )
        self.spec = spec
        self.context = context
        self._max_model_len = max_model_len
        self._rotary_tables: dict[RopeSpec, RotaryTable] = {}
        inner = context.at(self.prefix)
        self.embedding = self.build_embedding(inner.at(self.embedding_name))
        self.layers = tuple(self.build_layer(index, inner.at(f"layers.{index}")) for index in range(spec.num_layers))
        self.norm = self.build_norm(inner.at("norm"))
        self.head = self._build_head()
        self.draft_layers = tuple(self.build_draft_layer(index) for index in range(num_draft_layers))
        self.kv_layout = KvLayout(layers=number_caches(self))
        """What the layers keep."""

    # --- what families may replace

    def build_embedding(self, context: LayerContext) -> Embedding:
        """The token embedding."""
        return Embedding(context, vocab_size=self.spec.vocab_size, hidden_size=self.spec.hidden_size)

    def build_norm(self, context: LayerContext) -> RmsNorm:
        """The norm behind the last layer."""
        return RmsNorm(context, size=self.spec.hidden_size, eps=self.spec.norm_eps)

    def build_layer(self, index: int, context: LayerContext) -> Module:
        """The layer with this index: a `DecoderLayer`, unless `run_layers` is replaced."""
        raise NotImplementedError

    def run_layers(self, x_TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Embedded tokens -> hidden states after the final norm, [T, D]."""
        residual_TD = torch.zeros_like(x_TD)
        for layer in self.layers:
            x_TD, residual_TD = cast("DecoderLayer", layer)(x_TD, residual_TD, inputs)
        return self.norm.add(x_TD, residual_TD)[0]

    def build_draft_layer(self, index: int) -> DraftLayer:
        """The drafting layer with this index, from 0. `self.context` is at the root of the checkpoint."""
        raise NotImplementedError

    def ignored_names(self) -> tuple[str, ...]:
        """Further regular expressions of tensors that carry nothing the model needs."""
        return ()

    # --- what is alike

    def rotary(self, rope: RopeSpec) -> RotaryTable:
        """The table of a rotary embedding, which the layers that have it share."""
        if rope not in self._rotary_tables:
            device, dtype = self.context.device, self.context.dtype
            table = RotaryTable(rope, num_positions=self._max_model_len, dtype=dtype, device=device)
            self._rotary_tables[rope] = table
        return self._rotary_tables[rope]

    def _build_head(self) -> LogitsHead:
        context = self.context.at(self.head_name)
        if self.spec.has_tied_embeddings:
            return LogitsHead(context, self.embedding.shard, is_tied=True)
        sizes = {"vocab_size": self.spec.vocab_size, "hidden_size": self.spec.hidden_size}
        return LogitsHead(context, VocabularyShard(context, **sizes), is_tied=False)

    @property
    def vocab_size(self) -> int:
        """Size of the full vocabulary, over all ranks."""
        return self.spec.vocab_size

    @property
    def num_draft_layers(self) -> int:
        """Layers that can draft; 0: none were built."""
        return len(self.draft_layers)

    def checkpoint_map(self) -> CheckpointMap:
        """Where checkpoint tensors go. Valid until `finish_loading`. With tied embeddings a stored head is a copy."""
        tied = (rf"{self.head_name}\.weight",) if self.spec.has_tied_embeddings else ()
        return CheckpointMap(
            parts=self.weight_parts(),
            ignored=(_DERIVED, *tied, *self.ignored_names(), *self.context.quantization.ignored),
        )

    def forward(self, batch: ForwardBatch, inputs: LayerInputs | None = None) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]; writes what the step leaves behind into `batch.caches`.

        inputs: how layers are to see the batch; None: as it is.
        """
        return self.run_layers(self.embedding(batch.token_ids), inputs or LayerInputs(batch, self.context.ops))

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S samples, from hidden states [S, D]."""
        return self.head(hidden_SD)

    def forward_draft(
        self, index: int, next_token_ids_T: torch.Tensor, hidden_TD: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """The drafting layer `index` over a step's tokens, [T, D].

        next_token_ids_T: the token behind each of the batch's tokens (for layer i, the one i + 1 behind);
        hidden_TD: what `forward`, or the drafting before, returned. `batch.token_ids` are not used.
        """
        embedded_TD = self.embedding(next_token_ids_T)
        return self.draft_layers[index](embedded_TD, hidden_TD, LayerInputs(batch, self.context.ops))

    def compute_draft_logits(self, index: int, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S drafted tokens, from what `forward_draft` returned."""
        return self.draft_layers[index].compute_logits(hidden_SD)
