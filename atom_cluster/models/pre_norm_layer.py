"""The usual decoder layer: attention and MLP, each behind a norm and added to the residual stream. Knows no family."""

from __future__ import annotations

from typing import Protocol, cast

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.module import Module
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.linear import LinearOp


class SelfAttention(Protocol):
    """Mixes tokens. Also a `Module`."""

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs, /) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        ...


class FeedForward(Protocol):
    """Works on each token alone. Also a `Module`."""

    def __call__(self, x_TD: torch.Tensor, /) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        ...


class StartsWithProduct(Protocol):
    """What attention and MLP may be: their inputs go into one product and nowhere else."""

    @property
    def first(self) -> tuple[LinearOp, GateAndMul | None]:
        """The product and its activation."""
        ...

    def behind_first(self, y_TO: torch.Tensor, *inputs: LayerInputs) -> torch.Tensor:
        """[T, O] -> [T, D]: as when called, from the product on."""
        ...


class PreNormLayer(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        context: LayerContext,
        *,
        hidden_size: int,
        norm_eps: float,
        attention: SelfAttention,
        mlp: FeedForward,
        mlp_norm_name: str = "post_attention_layernorm",
        is_norm_offset: bool = False,
    ) -> None:
        """is_norm_offset: the norms' stored weights are what is added to one."""

        def norm(name: str) -> RmsNorm:
            return RmsNorm(context.at(name), size=hidden_size, eps=norm_eps, is_offset=is_norm_offset)

        self.attention_norm = norm("input_layernorm")
        self.attention = attention
        self.mlp_norm = norm(mlp_norm_name)
        self.mlp = mlp
        self._attention_starts_with_product = _starts_with_product(attention)
        self._mlp_starts_with_product = _starts_with_product(mlp)

    def __call__(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the layer before, residual stream without it) -> the same of this layer."""
        if self._attention_starts_with_product:
            attention = cast("StartsWithProduct", self.attention)
            y_TO, residual_TD = self.attention_norm.add_and_multiply(x_TD, residual_TD, *attention.first)
            x_TD = attention.behind_first(y_TO, inputs)
            del y_TO  # which is wide, and would be there while experts need the most memory
        else:
            x_TD, residual_TD = self.attention_norm.add(x_TD, residual_TD)
            x_TD = self.attention(x_TD, inputs)
        if self._mlp_starts_with_product:
            mlp = cast("StartsWithProduct", self.mlp)
            y_TO, residual_TD = self.mlp_norm.add_and_multiply(x_TD, residual_TD, *mlp.first)
            return mlp.behind_first(y_TO), residual_TD
        x_TD, residual_TD = self.mlp_norm.add(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


def _starts_with_product(part: object) -> bool:
    """Whether it is a `StartsWithProduct`. Its class is asked: the product itself is made when weights are loaded."""
    return all(hasattr(type(part), name) for name in ("first", "behind_first"))
