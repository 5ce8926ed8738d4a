"""Tokens on their way to the ranks that have their experts, and back. Knows no layers and no experts' weights.

For groups whose ranks have different tokens. Where all ranks have all tokens, each computes what its experts add, and
a sum over the ranks is the whole exchange: that is what `layers.experts` does.

Shape suffixes: T tokens of this rank, R tokens that this rank computes, D hidden dims, K experts per token, G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from atom_cluster.parallel.collectives import exchange_rows
from atom_cluster.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class ReceivedTokens:
    """What a rank's experts are applied to."""

    x_RD: torch.Tensor
    """Rows beyond those received are arbitrary, and name no expert of this rank."""
    expert_RK: torch.Tensor
    """int64, among this rank's experts; their number stands for an expert of another rank."""
    weight_RK: torch.Tensor
    """float32."""
    way_back: Any
    """What the exchange that sent them needs for `combine`."""


class TokenExchange(Protocol):
    """Every rank of a group calls both, in turn, once per layer. What a method returns may be overwritten when it is
    called again."""

    def dispatch(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> ReceivedTokens:
        """Send each token once to every rank that has an expert of it. expert_TK: int64, among all ranks' experts, of
        which each rank has as many; weight_TK: float32. T may differ between ranks, and be 0."""
        ...

    def combine(self, y_RD: torch.Tensor, received: ReceivedTokens) -> torch.Tensor:
        """Weighted sums of this rank's experts -> of all ranks' experts, for this rank's tokens, [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    token_N: torch.Tensor
    """The tokens that were sent, for rank 0 first."""
    sent: list[int]
    received: list[int]
    """By rank."""
    num_tokens: int


class AllToAllExchange:
    """By torch.distributed's all-to-all, of exactly the tokens that each rank needs.

    The ranks tell each other how many those are: it waits for the device, and cannot be captured in a graph.
    """

    def __init__(self, group: Group, *, num_local_experts: int) -> None:
        self._group, self._num_local_experts = group, num_local_experts

    def dispatch(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> ReceivedTokens:
        """Send each token once to every rank that has an expert of it."""
        group, device = self._group, x_TD.device
        is_wanted_TG = torch.zeros(len(x_TD), group.size, dtype=torch.bool, device=device)
        is_wanted_TG.scatter_(1, expert_TK // self._num_local_experts, value=True)
        token_N = is_wanted_TG.T.nonzero()[:, 1]
        sent_G = is_wanted_TG.sum(0)
        received_G = exchange_rows(sent_G, [1] * group.size, [1] * group.size, group)
        way_back = _Sent(token_N, sent_G.tolist(), received_G.tolist(), len(x_TD))
        x_RD, expert_RK, weight_RK = (
            exchange_rows(rows[token_N], way_back.sent, way_back.received, group)
            for rows in (x_TD, expert_TK, weight_TK)
        )
        return ReceivedTokens(x_RD, local_experts(expert_RK, group, self._num_local_experts), weight_RK, way_back)

    def combine(self, y_RD: torch.Tensor, received: ReceivedTokens) -> torch.Tensor:
        """Addends go back to where their tokens came from, and are added up in float32 or wider."""
        way: _Sent = received.way_back
        y_ND = exchange_rows(y_RD, way.received, way.sent, self._group)
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        total_TD = y_RD.new_zeros(way.num_tokens, y_RD.shape[-1], dtype=wide)
        return total_TD.index_add_(0, way.token_N, y_ND.to(wide)).to(y_RD.dtype)


def local_experts(expert_RK: torch.Tensor, group: Group, num_local_experts: int) -> torch.Tensor:
    """Ids among all experts -> among this rank's; `num_local_experts` for those of other ranks."""
    local_RK = expert_RK - group.rank * num_local_experts
    return local_RK.masked_fill((local_RK < 0) | (local_RK >= num_local_experts), num_local_experts)
