"""Norm layers, replicated on every rank. Know no models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.linear import LinearOp, normalized_product
from atom_cluster.parallel.sharding import Span, WeightPart, WeightParts, whole


class RmsNorm(Module):
    """Normalises the last dimension. Its tensor is `<name>.weight`."""

    def __init__(
        self,
        context: LayerContext,
        *,
        size: int,
        eps: float,
        is_offset: bool = False,
        is_wide: bool = False,
        full_size: int | None = None,
        span: Span | None = None,
    ) -> None:
        """is_offset: the stored weight is what is added to one.

        is_wide: the weight and the product with it are float32 or wider; only the result is rounded.

        span, full_size: the rank has these `size` weights out of `full_size`; None: all.
        """
        self._name = f"{context.name}.weight"
        self._ops = context.ops
        self._eps = eps
        self._is_offset = is_offset
        self._full_size = size if full_size is None else full_size
        self._span = Span(0, size) if span is None else span
        dtype = torch.promote_types(context.dtype, torch.float32) if is_wide else context.dtype
        self.weight_D = torch.empty(size, dtype=dtype, device=context.device)

    def weight_parts(self) -> dict[str, WeightPart]:
        """Where the checkpoint's tensor goes, by its full name."""
        cut = (self._span.as_slice,)
        return {self._name: WeightPart(target=self.weight_D, full_shape=(self._full_size,), cut=cut)}

    def finish_loading(self) -> None:
        """The weight is in place."""
        if self._is_offset:
            self.weight_D += 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        return self._ops.rms_norm(x, self.weight_D, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual); `residual` may be overwritten."""
        return self._ops.add_rms_norm(x, residual, self.weight_D, self._eps)

    def add_and_multiply(
        self, x_TI: torch.Tensor, residual_TI: torch.Tensor, op: LinearOp, activation: GateAndMul | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(product of the norm of x + residual, and what the activation makes of it, x + residual), as `add` and the op
        would give; `residual_TI` may be overwritten."""
        norm, weight_I = self._ops.add_rms_norm, self.weight_D
        return normalized_product(op, norm, x_TI, residual_TI, weight_I, self._eps, activation)


class LayerNorm(Module):
    """Centres and normalises the last dimension, in float32 or wider. Its tensors are `<name>.weight` and `.bias`."""

    def __init__(self, context: LayerContext, *, size: int, eps: float) -> None:
        self._name = context.name
        self._eps = eps
        wide = torch.promote_types(context.dtype, torch.float32)
        self._weight_D = torch.empty(size, dtype=wide, device=context.device)
        self._bias_D = torch.empty(size, dtype=wide, device=context.device)

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        return {f"{self._name}.weight": whole(self._weight_D), f"{self._name}.bias": whole(self._bias_D)}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        wide = x.to(self._weight_D.dtype)
        return F.layer_norm(wide, self._weight_D.shape, self._weight_D, self._bias_D, self._eps).to(x.dtype)
