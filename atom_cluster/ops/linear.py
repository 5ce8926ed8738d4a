"""Contract of the linear op: weights are prepared once after loading, then applied every step. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.norm import AddRmsNorm


class LinearOp(Protocol):
    """A matrix product with weights that were prepared for one backend."""

    @property
    def name(self) -> str:
        """What became of the weight, for the start-up log: `float32`, `packed float16`."""
        ...

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], plus the bias if there is one, of the out dtype it was made for. The input is kept."""
        ...


class GatedProduct(Protocol):
    """What a LinearOp may have as its method `gated`: the product and its activation, in one kernel where that is
    faster."""

    def __call__(self, x_TI: torch.Tensor, activation: GateAndMul) -> torch.Tensor:
        """[T, in] -> [T, out / 2]: what the activation makes of outputs that were rounded to the out dtype."""
        ...


def gated_product(op: LinearOp, x_TI: torch.Tensor, activation: GateAndMul) -> torch.Tensor:
    """[T, in] -> [T, out / 2]: what the activation makes of an op's outputs, gates first."""
    # Asked for by its name: to check a protocol takes as long as a small kernel.
    gated: GatedProduct | None = getattr(op, "gated", None)
    return activation(op(x_TI)) if gated is None else gated(x_TI, activation)


class NormalizedProduct(Protocol):
    """What a LinearOp may have as its method `normalized`: a norm, the product and its activation in one kernel."""

    def __call__(
        self,
        x_TI: torch.Tensor,
        residual_TI: torch.Tensor,
        weight_I: torch.Tensor,
        eps: float,
        activation: GateAndMul | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(product of what `AddRmsNorm` normalises, or what the activation makes of it; the sum). None where kernels of
        their own are faster; nothing was done then."""
        ...


def normalized_product(
    op: LinearOp,
    norm: AddRmsNorm,
    x_TI: torch.Tensor,
    residual_TI: torch.Tensor,
    weight_I: torch.Tensor,
    eps: float,
    activation: GateAndMul | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, in], [T, in]) -> ([T, out], or [T, out / 2] with an activation; [T, in]): an op's outputs for the normalised
    sum of a layer's output and the residual stream, and that sum. May overwrite `residual_TI`, as the norm may."""
    normalized: NormalizedProduct | None = getattr(op, "normalized", None)
    found = None if normalized is None else normalized(x_TI, residual_TI, weight_I, eps, activation)
    if found is not None:
        return found
    x_TI, residual_TI = norm(x_TI, residual_TI, weight_I, eps)
    return op(x_TI) if activation is None else gated_product(op, x_TI, activation), residual_TI


class PrepareLinear(Protocol):
    """Makes a LinearOp of a loaded weight. Callers drop their reference, so a packed copy replaces the original."""

    def __call__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
    ) -> LinearOp:
        """Prepare [out, in] weights, stored in any float dtype, for inputs of `dtype`. Does not change `weight_OI`.

        out_dtype: `dtype` (None means the same), or float32 for sums that are not rounded to half precision; the
        weights are rounded to `dtype` in any case.
        """
        ...
