"""Rotary angles by position, tabulated once. Knows no attention.

Shape suffixes: L positions of the table, T tokens, P rotated dims of a head, F frequencies (P / 2).
"""

from __future__ import annotations

import math

import torch

from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.ops.rotary import Rotary


class RotaryTable:
    """Cosines and sines of all positions, as `ops.rotary` takes them."""

    def __init__(self, spec: RopeSpec, *, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        """Angles are computed in float32 and kept in float32, or in float64 when that is `dtype`."""
        angle_LF = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(spec))
        cos_LF, sin_LF = angle_LF.cos() * spec.attention_factor, angle_LF.sin() * spec.attention_factor
        kept = torch.promote_types(dtype, torch.float32)
        self._cos_L1P = torch.cat((cos_LF, cos_LF), dim=-1)[:, None].to(device, kept)
        self._sin_L1P = torch.cat((-sin_LF, sin_LF), dim=-1)[:, None].to(device, kept)

    def at(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [T, 1, P], with the sines' first half negated."""
        return self._cos_L1P.index_select(0, positions_T), self._sin_L1P.index_select(0, positions_T)


def rotate_trailing(rotary: Rotary, x_THD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    """[T, H, D] with the last P dims of each head rotated, in pairs of neighbours."""
    rotary_dim = cos_T1P.shape[-1]
    passed, rotated = x_THD[..., :-rotary_dim], x_THD[..., -rotary_dim:]
    rotated, _ = rotary(rotated, rotated[:, :0], cos_T1P, sin_T1P, is_interleaved=True)
    return torch.cat((passed, rotated), dim=-1)


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """Radians per position of each pair of dims, [F] float32."""
    exponent_F = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    base_F = 1.0 / spec.theta**exponent_F
    if spec.kind == "default":
        return base_F
    if spec.kind == "linear":
        return base_F / spec.factor
    if spec.kind == "llama3":
        return _blend_by_wavelength(base_F, spec)
    return _blend_by_dim(base_F, spec)


def _blend_by_wavelength(base_F: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """llama3: slow dims are stretched, fast ones kept, and those between go from one to the other."""
    turns_F = spec.original_max_positions * base_F / (2 * math.pi)
    kept_share_F = (turns_F - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept_share_F = kept_share_F.clamp(0, 1)
    return kept_share_F * base_F + (1 - kept_share_F) * base_F / spec.factor


def _blend_by_dim(base_F: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """yarn: a ramp over dims, from those that turn `beta_fast` times in the original context to `beta_slow` times."""
    first, last = _dim_with_turns(spec, spec.beta_fast), _dim_with_turns(spec, spec.beta_slow)
    if spec.has_truncated_ramp:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.rotary_dim - 1)
    width = max(last - first, 0.001)
    stretched_share_F = ((torch.arange(len(base_F), dtype=torch.float32) - first) / width).clamp(0, 1)
    return stretched_share_F * base_F / spec.factor + (1 - stretched_share_F) * base_F


def _dim_with_turns(spec: RopeSpec, num_turns: float) -> float:
    """Index of the pair of dims, as a real number, that turns so often within the original context."""
    positions_per_radian = spec.original_max_positions / (num_turns * 2 * math.pi)
    return spec.rotary_dim * math.log(positions_per_radian) / (2 * math.log(spec.theta))
