"""GrammarState: one output's place in its grammar. Knows no device and no batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from atom_cluster.structured.grammar import CompiledGrammar

Words = npt.NDArray[np.int32]


class GrammarState:
    """Follows one output. Not thread-safe.

    Before the tokens `after`, if there are any, the output is free. Where the grammar may end, end tokens are allowed
    besides what goes on; elsewhere they are not. Before `min_tokens` an end token is allowed only where nothing else
    is. A stop token that the grammar has as text ends the output wherever it is drawn, as stop tokens do.
    """

    error: str | None = None
    """Why the output cannot go on. Then everything is allowed, and what is drawn is not to be used."""

    def __init__(
        self,
        grammar: CompiledGrammar,
        *,
        after: Sequence[int] = (),
        eos_token_ids: Iterable[int],
        stop_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """eos_token_ids: tokens that are nothing but an end. stop_token_ids: tokens that may be text as well."""
        self.vocabulary = vocabulary = grammar.vocabulary
        self.matcher = grammar.matcher.deep_copy()
        """Advanced by all tokens behind `after`."""
        self.num_tokens = 0
        """Tokens of the output so far."""
        self.is_over = False
        """Whether it has ended with an end token."""
        self._after = list(after)
        self._tail: list[int] = []
        self._is_free = bool(after)
        self._min_tokens = min_tokens
        only_ends = {token_id for token_id in eos_token_ids if 0 <= token_id < vocabulary.vocab_size}
        ends = only_ends | {token_id for token_id in stop_token_ids if 0 <= token_id < vocabulary.vocab_size}
        self._ends = frozenset(ends)
        self._end_bits = _Bits(sorted(ends))
        self._eos_bits = _Bits(sorted(only_ends))
        self._marker_bit = _Bits([vocabulary.marker])

    @property
    def applies(self) -> bool:
        """Whether the next token has to fit the grammar."""
        return not self._is_free and not self.is_over and self.error is None

    def advance(self, token_ids: Iterable[int]) -> None:
        """The output has these tokens more. Sets `error` when one of them does not fit."""
        for token_id in token_ids:
            if self.is_over or self.error is not None:
                return
            self.num_tokens += 1
            if token_id in self._ends:
                self.is_over = True
            elif self._is_free:
                self._tail = _tail(self._tail, token_id, len(self._after))
                self._is_free = self._tail != self._after
            elif self.matcher.try_consume_tokens([token_id]) != 1:
                self.error = self.matcher.get_error() or f"token {token_id} does not fit the grammar"

    def num_free(self, drafts: Sequence[int]) -> int:
        """At how many of the positions before, between and behind these drafts the grammar does not apply yet."""
        if self.is_over or self.error is not None:
            return len(drafts) + 1
        if not self._is_free:
            return 0
        tail = self._tail
        for index, token_id in enumerate(drafts):
            if token_id in self._ends:
                break
            tail = _tail(tail, token_id, len(self._after))
            if tail == self._after:
                return index + 1
        return len(drafts) + 1

    def settle(self, masks: Words, num_free: int) -> None:
        """End tokens in masks [positions, words] of the next positions: allowed or not, as the class says. In place.

        The first `num_free` are everything. In the others the library allowed the marker where the grammar may end.
        Sets `error` when nothing can follow.
        """
        if self.is_over or self.error is not None:
            return
        if self.matcher.is_error():
            self._fail(masks, self.matcher.get_error() or "the grammar is too complex")
            return
        for index, words in enumerate(masks):
            is_early = self.num_tokens + index < self._min_tokens
            if index < num_free:
                if is_early:
                    self._end_bits.clear(words)
                continue
            may_end = self._marker_bit.is_set(words)
            if may_end and (words == -1).all():
                continue  # behind a draft that does not fit
            self._marker_bit.clear(words)
            self._eos_bits.clear(words)
            if may_end:
                self._allow_ends(words, is_early=is_early)
            elif index == num_free and not words.any():
                self._fail(masks, "no token can follow")
                return
        if num_free == 0 and self.matcher.is_stopped() and not self.matcher.is_accepting():
            self._fail(masks, "no token can follow")

    def _allow_ends(self, words: Words, *, is_early: bool) -> None:
        if is_early:
            self._end_bits.clear(words)
            if words.any():
                return
        self._end_bits.set(words)

    def _fail(self, masks: Words, reason: str) -> None:
        self.error = " ".join(reason.split())
        masks.fill(-1)


class _Bits:
    """A few bits of a mask."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        bits: dict[int, int] = {}
        for token_id in token_ids:
            bits[token_id // 32] = bits.get(token_id // 32, 0) | 1 << token_id % 32
        self._index = np.array(list(bits), dtype=np.int64)
        self._bits = np.array(list(bits.values()), dtype=np.uint32).view(np.int32)

    def set(self, words: Words) -> None:
        words[self._index] |= self._bits

    def clear(self, words: Words) -> None:
        words[self._index] &= ~self._bits

    def is_set(self, words: Words) -> bool:
        return bool((words[self._index] & self._bits).all())


def _tail(tail: list[int], token_id: int, length: int) -> list[int]:
    return [*tail, token_id][-length:]
