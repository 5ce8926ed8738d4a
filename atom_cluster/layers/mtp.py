"""A layer for multi-token prediction: drafts the token after next from a hidden state and the next token's embedding.

Embedding and head are the main model's. Knows no models and no drafting. Shape suffixes: T tokens, D hidden dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.logits import Logits, LogitsHead
from atom_cluster.layers.module import Module
from atom_cluster.layers.norm import RmsNorm


class MtpBlock(Protocol):
    """One layer like those of the main model. Also a `Module`."""

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpSpec:
    """Sizes, and names of tensors behind that of the layer."""

    hidden_size: int
    norm_eps: float
    is_norm_offset: bool = False
    """The norms' stored weights are what is added to one."""
    embedding_norm: str = "enorm"
    hidden_norm: str = "hnorm"
    projection: str = "eh_proj"
    output_norm: str = "shared_head.norm"


class MtpLayer(Module):
    """norm(block(projection([norm(embedding), norm(hidden)])))"""

    def __init__(self, context: LayerContext, spec: MtpSpec, block: MtpBlock, head: LogitsHead) -> None:
        """head: the main model's, which stays its owner."""

        def norm(name: str) -> RmsNorm:
            return RmsNorm(context.at(name), size=spec.hidden_size, eps=spec.norm_eps, is_offset=spec.is_norm_offset)

        self.embedding_norm = norm(spec.embedding_norm)
        self.hidden_norm = norm(spec.hidden_norm)
        outputs = [Output(spec.projection, spec.hidden_size)]
        self.projection = ColumnLinear(context, num_in=2 * spec.hidden_size, outputs=outputs)
        self.block = block
        self.output_norm = norm(spec.output_norm)
        # A method hides it from `Module.parts`, where the main model has it already.
        self._project_to_logits = head.__call__

    def __call__(self, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """(embedding of each token's successor, normed hidden state of each token) -> normed hidden state, [T, D]."""
        both = (self.embedding_norm(embedded_TD), self.hidden_norm(hidden_TD))
        x_TD = self.projection(torch.cat(both, dim=-1))
        x_TD, residual_TD = self.block(x_TD, torch.zeros_like(x_TD), inputs)
        return self.output_norm.add(x_TD, residual_TD)[0]

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S samples, from [S, D] of what `__call__` returned."""
        return self._project_to_logits(hidden_SD)
