"""Speculative decoding: several tokens per step, the same output."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class SpeculativeConfig(FrozenConfig):
    """Tokens are drafted cheaply and verified together in the next step. Answers are those without speculation."""

    method: Literal["mtp"] = "mtp"
    """Who drafts. mtp: the layers for multi-token prediction that the checkpoint brings along."""
    num_tokens: int = Field(1, ge=1, le=16)
    """Tokens drafted behind each sampled one. More than the checkpoint has layers for: the last layer drafts again."""
