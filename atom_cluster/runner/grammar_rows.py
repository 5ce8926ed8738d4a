"""Rows with a grammar: which tokens each of their samples may choose from.

Masks are made on the host, from a row's tokens, which are on the device: so a step with such rows asks for their newest
tokens before its forward pass is issued, and waits for them behind it, while the device computes. A row's place in its
grammar follows from its tokens alone, so it is the same on all ranks, after a preemption, behind a handoff and on
another replica. Steps without such rows do nothing of this. Knows no model and no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atom_cluster.messages.grammars import GrammarReady
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.runner.host_tensors import on_device, send
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import TokenMasks
from atom_cluster.runner.step_layout import SamplingStep, sampling_steps
from atom_cluster.structured.held import HeldGrammars
from atom_cluster.structured.masks import MaskFiller, MaskRequest
from atom_cluster.structured.state import GrammarState


@dataclass(slots=True)
class _GrammarRow:
    """A row that has a grammar."""

    new: NewRow
    num_read: int
    """Tokens of the row that the host knows, prompt included."""
    state: GrammarState | None = None
    """None until the row samples for the first time; its grammar is compiled by then."""


class GrammarRows:
    """All such rows of one rank. All calls but `poll` from one thread."""

    def __init__(self, *, held: HeldGrammars, num_drafts: int, device: torch.device) -> None:
        """held: becomes this object's to close. device: where rows are."""
        self._held = held
        self._num_drafts = num_drafts
        self.device = device
        self._rows: dict[int, _GrammarRow] = {}
        self._filler = MaskFiller()
        self._num_words = 0
        """Of a mask; set when the first row begins."""

    def warm_up(self) -> None:
        """Make the vocabulary now."""
        self._held.warm_up()

    def apply(self, plan: StepPlan) -> None:
        """Bring rows up to date for `plan`; the grammars that it asks for are compiled beside it, on another thread."""
        self._held.execute(plan.grammars)
        if self._rows:
            for row in plan.freed_rows:
                self._rows.pop(row, None)
        for new in plan.new_rows:
            if new.sampling.grammar is not None:
                self._rows[new.row] = _GrammarRow(new, num_read=len(new.token_ids))

    def poll(self) -> list[GrammarReady]:
        """Compilations that ended since the last call. Never blocks; may be called from any one thread."""
        return self._held.poll()

    def read(self, steps: Sequence[RowStep], table: RowTable) -> PendingMasks | None:
        """Ask the device for the newest tokens of those of a step's rows that sample and have grammars. None: there are
        none. To be called before the step is issued."""
        if not self._rows:
            return None
        sampling = sampling_steps(steps)
        places = [i for i, step in enumerate(sampling) if step.row in self._rows]
        if not places:
            return None
        row_G = on_device([sampling[i].row for i in places], torch.int64, self.device)
        known_G = table.num_known[row_G]
        # What the last step may have brought, and the drafts behind.
        distance = torch.arange(-1 - self._num_drafts, self._num_drafts, device=self.device)
        position = (known_G[:, None] + distance).clamp(min=0)
        tokens = table.tokens_at(row_G[:, None].expand_as(position), position)
        found = torch.cat((known_G[:, None], tokens), dim=1).to("cpu", non_blocking=True)
        event: torch.Event | None = None
        if self.device.type != "cpu":
            event = torch.Event(self.device)
            event.record(torch.accelerator.current_stream(self.device))
        return PendingMasks(self, sampling, places, found, event)

    def advance(self, row: int, known: int, window: Sequence[int], num_drafts: int) -> MaskRequest | None:
        """The row has `known` tokens, the last of which, and drafts behind them, are in `window`. What is to be masked;
        None: nothing, as the row has failed. Raises `ProtocolError` when its grammar is not compiled yet."""
        grammar_row = self._rows[row]
        state = grammar_row.state = grammar_row.state or self._begin(grammar_row.new)
        if state.error is not None:
            return None
        first_draft = 1 + self._num_drafts
        state.advance(window[first_draft - (known - grammar_row.num_read) : first_draft])
        grammar_row.num_read = known
        return MaskRequest(state, tuple(window[first_draft : first_draft + num_drafts]))

    def error_of(self, row: int) -> str | None:
        """Why the row cannot go on."""
        grammar_row = self._rows.get(row)
        if grammar_row is None or grammar_row.state is None:
            return None
        return grammar_row.state.error

    def masks(self, requests: Sequence[MaskRequest]) -> torch.Tensor:
        """[M, W] int32 in host memory: see `MaskFiller.fill`."""
        return torch.from_numpy(self._filler.fill(requests, self._num_words))

    def close(self) -> None:
        """End the compiler. Idempotent."""
        self._rows.clear()
        self._held.close()

    def _begin(self, new: NewRow) -> GrammarState:
        state = self._held.begin(new)
        self._num_words = state.vocabulary.num_words
        return state


@dataclass(frozen=True, slots=True)
class PendingMasks:
    """Masks of one step, whose tokens are on their way to the host."""

    rows: GrammarRows
    sampling: Sequence[SamplingStep]
    places: Sequence[int]
    """Indices into `sampling` of the rows that have grammars."""
    found: torch.Tensor
    """[G, 2 + 2K] int64 in host memory: how many tokens each has, the last 1 + K of them, K drafts."""
    event: torch.Event | None
    """When `found` is there; None: it is."""

    def wait(self, num_samples: Sequence[int]) -> tuple[TokenMasks | None, dict[int, str]]:
        """Masks for the step's samples; and by row, why it cannot go on. Waits for the step before this one.

        num_samples: of each row of the step that samples, and of those that stand for none.
        """
        if self.event is not None:
            self.event.synchronize()
        first_sample = np.cumsum([0, *num_samples])
        index = np.full(int(first_sample[-1]), -1, dtype=np.int64)
        requests: list[MaskRequest] = []
        num_masks = 0
        for place, (known, *window) in zip(self.places, self.found.tolist()):
            step = self.sampling[place]
            request = self.rows.advance(step.row, known, window, step.num_drafts)
            if request is not None:
                count = 1 + len(request.drafts)
                index[first_sample[place] : first_sample[place] + count] = range(num_masks, num_masks + count)
                requests.append(request)
                num_masks += count
        masks = None
        if requests:
            device = self.rows.device
            masks = TokenMasks(send(self.rows.masks(requests), device), send(torch.from_numpy(index), device))
        rows = (self.sampling[place].row for place in self.places)
        return masks, {row: error for row in rows if (error := self.rows.error_of(row)) is not None}
