"""Contract of hyper-connections: a residual of several streams, which blocks read from, write to, and mix.

For a token with streams S (N of D dims), z = fn * rms_norm(S as one vector), in groups of N, N and N * N outputs, each
with a factor and a bias. A block's input is sum_n r_n S_n, and behind its output y the streams are
S'_k = w_k y + sum_j mix[j, k] S_j, where

    r = sigmoid(z_r) + eps      w = 2 sigmoid(z_w)      mix = doubly stochastic (softmax(z_mix over k) + eps)

made so by alternately dividing columns (over j) and rows (over k) by their sums plus eps, columns first and last.
Knows no layers and no models.

Shape suffixes: T tokens, N streams, D hidden dims, J = (2 + N) N outputs, I = N D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRule:
    """The constants."""

    norm_eps: float
    """Of the norm of the streams, which has no weight."""
    eps: float
    num_iterations: int
    """How often columns are divided by their sums; rows, once less."""


class ConnectStreams(Protocol):
    """What a block reads, and how its output is to be written."""

    def __call__(
        self,
        streams_TND: torch.Tensor,
        fn_JI: torch.Tensor,
        scale_3: torch.Tensor,
        bias_J: torch.Tensor,
        rule: StreamRule,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(block input [T, D], w_TN, mix_TNN), all in the dtype of the streams; j before k in the mix.

        The other tensors are float32 or wider, which is what r, w and mix are computed in.
        """
        ...


class WriteStreams(Protocol):
    """The streams behind a block."""

    def __call__(
        self, streams_TND: torch.Tensor, output_TD: torch.Tensor, write_TN: torch.Tensor, mix_TNN: torch.Tensor
    ) -> torch.Tensor:
        """S'_k = w_k y + sum_j mix[j, k] S_j, [T, N, D], all in one dtype. Sums are taken in float32 or wider."""
        ...


class JoinStreams(Protocol):
    """What is read of the last streams: sum_n r_n S_n alone."""

    def __call__(
        self,
        streams_TND: torch.Tensor,
        fn_NI: torch.Tensor,
        scale_1: torch.Tensor,
        bias_N: torch.Tensor,
        rule: StreamRule,
    ) -> torch.Tensor:
        """[T, D] in the dtype of the streams. The other tensors are float32 or wider."""
        ...
