"""Reference Gated DeltaNet: row by row, token by token, as the recurrence is defined. Any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.gated_delta import GatedDeltaPlan, Gates, StateMetadata

NORM_EPS = 1e-6
"""Added to the squared length of queries and keys."""


class TokenByToken:
    """The recurrences of one step."""

    def __init__(self, rows: AttentionMetadata, states: StateMetadata) -> None:
        starts = rows.query_start_cpu
        self._tokens = [range(start, end) for start, end in zip(starts, starts[1:])]
        self._read_page_R = states.read_page
        self._write_page_RW = states.write_page
        self._keeps_all = states.keeps_all_cpu

    def convolve(self, x_TC: torch.Tensor, weight_CW: torch.Tensor, past_NCJ: torch.Tensor) -> torch.Tensor:
        """A causal convolution per channel, then silu."""
        wide = torch.promote_types(x_TC.dtype, torch.float32)
        y_TC = torch.empty_like(x_TC, memory_format=torch.contiguous_format)
        for row, tokens in enumerate(self._tokens):
            past_CJ = self._state_before(row, past_NCJ)
            for token in tokens:
                seen_CW = torch.cat((past_CJ, x_TC[token, :, None]), dim=1)
                y_TC[token] = F.silu((seen_CW.to(wide) * weight_CW.to(wide)).sum(dim=1)).to(x_TC.dtype)
                past_CJ = seen_CW[:, 1:]
                self._leave(past_CJ, row, token, past_NCJ)
        return y_TC

    def delta_rule(
        self,
        query_TGK: torch.Tensor,
        key_TGK: torch.Tensor,
        value_THV: torch.Tensor,
        gates: Gates,
        state_NHKV: torch.Tensor,
    ) -> torch.Tensor:
        """The gated delta rule."""
        decay_TH, learn_TH = activate(gates)
        group = value_THV.shape[1] // key_TGK.shape[1]
        query_THK = normalise(query_TGK).repeat_interleave(group, dim=1) * query_TGK.shape[-1] ** -0.5
        key_THK = normalise(key_TGK).repeat_interleave(group, dim=1)
        output_THV = torch.empty_like(value_THV, memory_format=torch.contiguous_format)
        for row, tokens in enumerate(self._tokens):
            state_HKV = self._state_before(row, state_NHKV)
            for token in tokens:
                state_HKV = state_HKV * decay_TH[token, :, None, None].exp()
                recalled_HV = torch.einsum("hk,hkv->hv", key_THK[token], state_HKV)
                learnt_HV = learn_TH[token, :, None] * (value_THV[token] - recalled_HV)
                state_HKV = state_HKV + torch.einsum("hk,hv->hkv", key_THK[token], learnt_HV)
                output_THV[token] = torch.einsum("hk,hkv->hv", query_THK[token], state_HKV).to(value_THV.dtype)
                self._leave(state_HKV, row, token, state_NHKV)
        return output_THV

    def _state_before(self, row: int, memory: torch.Tensor) -> torch.Tensor:
        page_1 = self._read_page_R[row : row + 1]
        state = memory.index_select(0, page_1.clamp(min=0))[0]
        return torch.where(page_1 >= 0, state, torch.zeros_like(state))

    def _leave(self, state: torch.Tensor, row: int, token: int, memory: torch.Tensor) -> None:
        """Write the state after a token, if it is to be kept."""
        tokens = self._tokens[row]
        if self._keeps_all[row]:
            self._write(state, row, token - tokens.start, memory)
        elif token == tokens.stop - 1:
            self._write(state, row, 0, memory)

    def _write(self, state: torch.Tensor, row: int, column: int, memory: torch.Tensor) -> None:
        page_1 = self._write_page_RW[row, column : column + 1]
        memory.index_copy_(0, page_1, state[None].to(memory.dtype))


def plan_gated_delta(rows: AttentionMetadata, states: StateMetadata) -> GatedDeltaPlan:
    """The plan of one step."""
    return TokenByToken(rows, states)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm and weight, then the gate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(dim=-1, keepdim=True) + eps)
    return (normalised * weight_D.to(wide) * F.silu(gate.to(wide))).to(x.dtype)


def activate(gates: Gates) -> tuple[torch.Tensor, torch.Tensor]:
    """(log of what is kept, share of what is learnt), each [T, H] in float32 or wider."""
    wide = gates.log_rate_H.dtype
    decay_TH = -gates.log_rate_H.exp() * F.softplus(gates.decay_TH.to(wide) + gates.decay_bias_H)
    return decay_TH, torch.sigmoid(gates.learn_TH.to(wide))


def normalise(x_TGK: torch.Tensor) -> torch.Tensor:
    """To unit length, in float32 or wider."""
    wide = x_TGK.to(torch.promote_types(x_TGK.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + NORM_EPS)
