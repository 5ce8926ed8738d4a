"""A simulated row's grammar: of the tokens that fit, the one that a made-up token leads to."""

from __future__ import annotations

import numpy as np

from atom_cluster.messages.steps import NewRow
from atom_cluster.structured.held import HeldGrammars
from atom_cluster.structured.masks import MaskFiller, MaskRequest
from atom_cluster.structured.state import GrammarState


class SimulatedGrammar:
    """Follows one row of a `SimulatedRunner`. What it chooses is a function of the row's tokens."""

    def __init__(self, new: NewRow, grammars: HeldGrammars, filler: MaskFiller) -> None:
        """Begins when the row first samples, when its grammar is among `grammars`. filler: shared with other rows."""
        self.error: str | None = None
        """Why the row cannot go on."""
        self._new = new
        self._end = next(iter((*new.eos_token_ids, *new.sampling.stop_token_ids)), None)
        self._grammars = grammars
        self._filler = filler
        self._state: GrammarState | None = None

    def choose(self, made_up: int) -> int:
        """The row's next token: `made_up` while the grammar does not apply, else the end, if it may end, or the token
        that fits and that `made_up` leads to. Raises `ProtocolError` when the grammar is not compiled yet."""
        state = self._state = self._state or self._grammars.begin(self._new)
        self.error = self.error or state.error
        if self.error is not None:
            return made_up
        token_id = made_up
        if state.applies:
            words = self._filler.fill([MaskRequest(state)], state.vocabulary.num_words)[0]
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: state.vocabulary.vocab_size]
            fitting = np.flatnonzero(bits)
            if not len(fitting):
                self.error = "no token of this vocabulary fits"
                return made_up
            may_end = self._end is not None and bool(bits[self._end])
            token_id = self._end if may_end and self._end is not None else int(fitting[made_up % len(fitting)])
        state.advance((token_id,))
        self.error = state.error
        return token_id
