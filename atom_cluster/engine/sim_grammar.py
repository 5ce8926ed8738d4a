"""A simulated row's grammar: of the tokens that fit, the one that a made-up token leads to."""

from __future__ import annotations

import numpy as np

from atom_cluster.errors import AtomClusterError
from atom_cluster.messages.steps import NewRow
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.masks import MaskFiller, MaskRequest
from atom_cluster.structured.state import GrammarState


class SimulatedGrammar:
    """Follows one row of a `SimulatedRunner`. What it chooses is a function of the row's tokens."""

    def __init__(self, new: NewRow, grammars: GrammarCompiler | None, filler: MaskFiller) -> None:
        """Compiles the grammar, or waits until it is. filler: shared with other rows."""
        self.error: str | None = None
        """Why the row cannot go on."""
        self._end = next(iter((*new.eos_token_ids, *new.sampling.stop_token_ids)), None)
        self._filler = filler
        self._state: GrammarState | None = None
        spec = new.sampling.grammar
        if grammars is None or spec is None:
            self.error = "this runner has no vocabulary"
            return
        try:
            grammar = grammars.submit(spec).result()
        except AtomClusterError as exc:
            self.error = str(exc)
            return
        self._vocabulary = grammar.vocabulary
        self._state = GrammarState(
            grammar,
            after=spec.after,
            eos_token_ids=new.eos_token_ids,
            stop_token_ids=new.sampling.stop_token_ids,
            min_tokens=new.sampling.min_tokens,
        )
        self._state.advance(new.token_ids[new.num_prompt_tokens :])

    def choose(self, made_up: int) -> int:
        """The row's next token: `made_up` while the grammar does not apply, else the end, if it may end, or the token
        that fits and that `made_up` leads to."""
        state = self._state
        if state is None or self.error is not None:
            return made_up
        token_id = made_up
        if state.applies:
            words = self._filler.fill([MaskRequest(state)], self._vocabulary.num_words)[0]
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._vocabulary.vocab_size]
            fitting = np.flatnonzero(bits)
            if not len(fitting):
                self.error = "no token of this vocabulary fits"
                return made_up
            may_end = self._end is not None and bool(bits[self._end])
            token_id = self._end if may_end and self._end is not None else int(fitting[made_up % len(fitting)])
        state.advance((token_id,))
        self.error = state.error
        return token_id
