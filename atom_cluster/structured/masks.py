"""Which tokens may come next, for all outputs of a step: one bit per token, one mask per position.

With drafts there is a mask before, between and behind them, each for the case that the drafts up to it are kept.
Behind a draft that the grammar refuses everything is allowed: that draft is not kept, so nothing is drawn there for
good.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLExecutor

from atom_cluster.structured.state import GrammarState, Words

_MAX_THREADS = 8
_CORES_PER_THREAD = 4
"""Ranks of one host share its cores."""


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """An output that needs masks."""

    state: GrammarState
    drafts: tuple[int, ...] = ()


class MaskFiller:
    """Fills masks, several outputs at a time where there are cores for it. All calls from one thread."""

    @cached_property
    def _executor(self) -> LLExecutor:
        """Its threads are there once they are needed."""
        num_threads = min(_MAX_THREADS, (os.cpu_count() or 1) // _CORES_PER_THREAD)
        return LLExecutor(max(1, num_threads))

    def fill(self, requests: Sequence[MaskRequest], num_words: int) -> Words:
        """Masks [M, num_words] of all requests, each with one more than it has drafts, one behind the other.

        States are where they were afterwards, but for `error`.
        """
        starts = np.cumsum([0, *(1 + len(request.drafts) for request in requests)]).tolist()
        masks = np.full((starts[-1], num_words), -1, dtype=np.int32)
        num_free = [request.state.num_free(request.drafts) for request in requests]
        alone, along = [], []
        for request, start, free in zip(requests, starts, num_free):
            if free < len(request.drafts):
                along.append((request.state.matcher, start + free, list(request.drafts[free:])))
            elif free == len(request.drafts):
                alone.append((request.state.matcher, start + free))
        place = (masks.ctypes.data, num_words * 4, len(masks))
        if alone:
            self._executor.unsafe_compute_mask_ptr(alone, *place)
        if along:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(along, *place)
        for request, start, end, free in zip(requests, starts, starts[1:], num_free):
            request.state.settle(masks[start:end], free)
        return masks
