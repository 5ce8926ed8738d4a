"""How fast this engine is, from its own steps and handoffs: what the router weighs prefill against decode with.

A step that computes prompts beside rows that decode counts for what it takes longer than a step of these rows alone.
Knows nothing of other engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.scheduler import ScheduledRow
from atom_cluster.messages.cluster import EngineSpeed
from atom_cluster.observability.estimates import FORGET_S, TimesBySize, largest_within

_WEIGHT = 1 / 8
"""Of the newest step that only decodes."""
_LEAST_SHARE = 0.1
"""Prompts cost at least this share of their step: steps differ by more than what one adds to the next."""
_DOUBT_S = 10.0
"""Told to the router, an estimate halves in this time unless new ones come. Else an engine that once seemed slow, or a
handoff that did, would get no more prompts, and so no chance to be measured again."""


class SpeedMeter:
    """Running estimates; see `messages.cluster.EngineSpeed`."""

    def __init__(self, config: SchedulerConfig, *, block_size: int, clock: Callable[[], float]) -> None:
        self._config = config
        self._block_size = block_size
        self._clock = clock
        self._prompt_times = TimesBySize()
        self._handoff_times = TimesBySize()
        self._decode_step_s = 0.0
        self._decode_step_at_s = self._prompt_step_at_s = -math.inf

    def note_step(self, rows: Sequence[ScheduledRow], seconds: float) -> None:
        """A step of these rows took so long."""
        num_prompt_tokens = sum(_num_prompt_tokens(row) for row in rows)
        if num_prompt_tokens:
            has_decoding = any(not _num_prompt_tokens(row) for row in rows)
            decode_s = self.decode_step_s if has_decoding else 0.0
            prompt_s = max(seconds - decode_s, _LEAST_SHARE * seconds)
            self._prompt_step_at_s = self._clock()
            self._prompt_times.note(num_prompt_tokens, prompt_s, now_s=self._prompt_step_at_s)
        else:
            before_s = self.decode_step_s
            self._decode_step_s = before_s + _WEIGHT * (seconds - before_s) if before_s else seconds
            self._decode_step_at_s = self._clock()

    def note_handoff(self, num_tokens_read: int, seconds: float) -> None:
        """A prompt has come from prefill just now, in so much more time than prefill took for it.

        Not counted if prompts were computed here meanwhile: messages wait for the end of long steps, so handoffs
        would seem slow, more prompts would be computed here, and there would be more long steps.
        """
        now_s = self._clock()
        if num_tokens_read > 0 and now_s - self._prompt_step_at_s > seconds:
            self._handoff_times.note(num_tokens_read, max(0.0, seconds), now_s=now_s)

    @property
    def decode_step_s(self) -> float:
        """Of a step that only decodes, lately; 0 if there was none, or none for as long as tables are remembered."""
        return self._decode_step_s if self._clock() - self._decode_step_at_s <= FORGET_S else 0.0

    def prompt_limit(self) -> int | None:
        """Prompt tokens that fit into a step beside rows that decode, given `scheduler.max_itl_s`; None if any number.

        At least one block, so that prompts go on however slow the steps are.
        """
        if self._config.max_itl_s is None:
            return None
        points = self._prompt_times.points(self._clock())
        if not points:
            return None  # nothing known: the first prompts tell
        num_tokens = int(largest_within(points, max(0.0, self._config.max_itl_s - self.decode_step_s)))
        return max(self._block_size, num_tokens)

    def speed(self, *, has_decoding: bool) -> EngineSpeed:
        """For the router. `has_decoding`: whether rows decode now, beside which prompts would be computed."""
        now_s = self._clock()
        chunk = self._config.max_num_batched_tokens
        limit = self.prompt_limit() if has_decoding else None
        return EngineSpeed(
            prompt_s=self._prompt_times.points(now_s, doubt_s=_DOUBT_S),
            decode_step_s=float(f"{self.decode_step_s:.2g}"),
            handoff_s=self._handoff_times.points(now_s, doubt_s=_DOUBT_S),
            chunk_tokens=chunk if limit is None else min(chunk, limit),
        )


def _num_prompt_tokens(row: ScheduledRow) -> int:
    # What is computed for another engine is all prompt, even if only its last token was not cached.
    return row.num_tokens if row.request.ticket_id is not None else row.num_prompt_tokens
