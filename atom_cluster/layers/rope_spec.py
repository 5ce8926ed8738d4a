"""RopeSpec: the numbers that define a model's rotary embedding. No tensors here; `rotary.py` makes the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One rotary embedding of a model; its layers may have different ones."""

    kind: RopeKind
    theta: float
    """Base of the geometric series of wavelengths."""
    rotary_dim: int
    """Leading dims of each head that are rotated."""
    factor: float = 1.0
    """How many times the context was extended: linear, llama3, yarn."""
    original_max_positions: int = 0
    """Context length before the extension: llama3, yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin; yarn's temperature."""
    has_truncated_ramp: bool = True
    """yarn: round the ramp's ends outwards to whole dims."""
