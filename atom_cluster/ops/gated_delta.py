"""Contract of Gated DeltaNet: a short convolution, a gated delta rule, both with states in pages, and a gated norm.

Knows no layers, requests or block managers.

Shape suffixes: T tokens of the step, R rows of the step, N pages, C channels, J inputs that the convolution looks back,
G key heads, H value heads, K dims of a key, V dims of a value. `H % G == 0`: value head h has key head `h // (H // G)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.ops.attention import AttentionMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMetadata:
    """Which states a step begins with and which pages it leaves new ones in. Rows are those of the attention metadata.

    A page may be read by several rows. A page that is written belongs to its row alone; it may be the one that the row
    reads, so a layer reads before it writes.
    """

    read_page: torch.Tensor
    """[R] int64: page with the state before the row's first token; -1 where the row begins with its first token."""
    write_page: torch.Tensor
    """[R, W] int64. W == 1: the state after the row's last token goes to write_page[r, 0]. W > 1, in speculative steps:
    of a row whose `keeps_all` is set, the state after its j-th token (j < W) goes to write_page[r, j]; any other row's
    last state goes to write_page[r, 0]."""
    keeps_all_cpu: tuple[bool, ...]
    """Per row; all False when W == 1. Rows with it set have at most W tokens, and there are few enough of them to be
    stepped through one by one."""


@dataclass(frozen=True, slots=True)
class Gates:
    """What decides how much a value head forgets and learns, as it comes out of the projections and the checkpoint."""

    decay_TH: torch.Tensor
    """`a`: in the activations' dtype."""
    learn_TH: torch.Tensor
    """`b`: in the activations' dtype."""
    log_rate_H: torch.Tensor
    """`A_log`: float32 or wider."""
    decay_bias_H: torch.Tensor
    """`dt_bias`: float32 or wider."""


class GatedDeltaPlan(Protocol):
    """The recurrences of one step, prepared once and used by every layer. Holds no reference to state memory.

    Both methods read each row's state from its `read_page` (zeros for -1), and write the states after it as the
    `StateMetadata` says. State memory may be strided over pages.
    """

    def convolve(self, x_TC: torch.Tensor, weight_CW: torch.Tensor, past_NCJ: torch.Tensor) -> torch.Tensor:
        """silu(sum over w of weight[c, w] * x[t - J + w, c]), a causal convolution per channel, [T, C]; W == J + 1.

        The state is a row's last J inputs, oldest first, in their own dtype. Sums are taken in float32 or wider. `x_TC`
        may be a strided view and is kept; the result is contiguous.
        """
        ...

    def delta_rule(
        self,
        query_TGK: torch.Tensor,
        key_TGK: torch.Tensor,
        value_THV: torch.Tensor,
        gates: Gates,
        state_NHKV: torch.Tensor,
    ) -> torch.Tensor:
        """The gated delta rule, [T, H, V] contiguous in the dtype of the values. Per row and head, token by token:

            S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = S^T q / sqrt(K)

        with q and k divided by sqrt(|.|^2 + 1e-6), beta = sigmoid(learn) and
        g = -exp(log_rate) * softplus(decay + decay_bias). Gates, sums and states are float32 or wider, the states'
        dtype; where several tokens are worked on at once, factors of a product may be rounded to the values' dtype.
        Inputs may be strided views and are kept.
        """
        ...


class PlanGatedDelta(Protocol):
    """Builds the plan of one step."""

    def __call__(self, rows: AttentionMetadata, states: StateMetadata) -> GatedDeltaPlan:
        """Called once per forward pass. Of `rows` only the token ranges and `num_decode_rows` are used."""
        ...


class GatedRmsNorm(Protocol):
    """An RMS norm whose output is gated."""

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight * silu(gate), [..., D] in the dtype of `x`; in float32 or wider inside.

        `gate` has the shape of `x` and may be a strided view.
        """
        ...
