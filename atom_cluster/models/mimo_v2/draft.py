"""The layers that draft tokens (multi-token prediction) of MiMo-V2-Flash. Knows no requests and no sampling.

Each starts from the model's hidden states, not from the layer's before it. So what a layer returns has both, side by
side: its own states, for logits, and the model's, for the next layer.
Shape suffixes: T tokens, D hidden dims, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.logits import Logits, LogitsHead
from atom_cluster.layers.module import Module
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.models.pre_norm_layer import PreNormLayer
from atom_cluster.models.spec import ModelSpec


class MimoDraftLayer(Module):
    """norm(block(join([norm(embedding of the next token), norm(the model's hidden state)]))), and the model's head."""

    def __init__(self, context: LayerContext, *, spec: ModelSpec, block: PreNormLayer, head: LogitsHead) -> None:
        self._size = spec.hidden_size

        def norm(name: str) -> RmsNorm:
            return RmsNorm(context.at(name), size=spec.hidden_size, eps=spec.norm_eps)

        self.embedding_norm, self.hidden_norm = norm("enorm"), norm("hnorm")
        self.join = ColumnLinear(context, num_in=2 * spec.hidden_size, outputs=[Output("eh_proj", spec.hidden_size)])
        self.block = block
        self.norm = norm("final_layernorm")
        # Only its method: the head is a part of the model, and must not be found here again.
        self._compute_logits = head.__call__

    def __call__(self, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """(embedding of each token's successor, [T, D] of the model or [T, 2 D] of such a layer) -> [T, 2 D]"""
        model_TD = hidden_TD[:, -self._size :]
        x_TD = self.join(torch.cat((self.embedding_norm(embedded_TD), self.hidden_norm(model_TD)), dim=-1))
        x_TD, residual_TD = self.block(x_TD, torch.zeros_like(x_TD), inputs)
        return torch.cat((self.norm.add(x_TD, residual_TD)[0], model_TD), dim=-1)

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S samples, from [S, 2 D] of `__call__`."""
        return self._compute_logits(hidden_SD[:, : self._size])
