"""How an engine fills its steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class SchedulerConfig(FrozenConfig):
    """Limits and policies of one engine's scheduler."""

    max_num_requests: int = Field(256, ge=1)
    """Most requests in one step, and rows of the runner."""
    max_num_batched_tokens: int = Field(8192, ge=1)
    """Token budget of one step, decodes first."""
    max_waiting_requests: int = Field(1024, ge=1)
    """Requests queued before new ones are refused with 503, at an engine, or at an ingress while there is none."""
    chunked_prefill: bool = True
    """Split prompts over steps; when off, the token budget must hold the longest prompt, `max_model_len`."""
    long_prefill_tokens: int = Field(0, ge=0)
    """Most tokens of one prompt in one step; 0 means the whole budget."""
    max_itl_s: float | None = Field(None, gt=0)
    """Seconds that a step may take while requests decode: with policy mixed, prompts beside them are cut into chunks
    that fit, by the measured times of earlier steps. null: whatever the token budget allows."""
    delay_factor: float = Field(0.0, ge=0)
    """Hold new prompts back until the oldest has waited this many times the last prompt step's duration."""
    policy: Literal["mixed", "prefill_first", "decode_only"] = "mixed"
    """mixed: decodes, then chunks of prompts. prefill_first: prompts alone while any wait. decode_only: prompts
    only in steps in which nothing decodes."""
    async_scheduling: bool = True
    """Plan the next step while the current one runs."""
