"""Find the first stop string in text that arrives in pieces, and keep back what might become one.

"First" is the match that completes first; of several that complete at the same character, the longest. So the result
does not depend on how the text was cut into pieces. Knows nothing of tokens.
"""

from __future__ import annotations


class StopMatcher:
    """Watches the text of one output. Constant work per character and stop string."""

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        """`stop_strings` are not empty strings."""
        self._automata = [_Automaton(text) for text in stop_strings]
        self._kept_back = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to be output and was not returned before.

        After a match returns what precedes it, and nothing from then on.
        """
        if self.matched is not None:
            return ""
        if not self._automata:
            return text
        pending = self._kept_back + text
        for position in range(len(self._kept_back), len(pending)):
            char = pending[position]
            completed = [automaton.text for automaton in self._automata if automaton.advance(char)]
            if completed:
                self.matched = max(completed, key=len)
                self._kept_back = ""
                return pending[: position + 1 - len(self.matched)]
        num_kept = max(automaton.num_matched for automaton in self._automata)
        cut = len(pending) - num_kept
        self._kept_back = pending[cut:]
        return pending[:cut]

    def finish(self) -> str:
        """The text that was kept back: no stop string came of it."""
        kept_back, self._kept_back = self._kept_back, ""
        return kept_back


class _Automaton:
    """Knuth-Morris-Pratt over one stop string: `num_matched` characters of it end the text so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallback = _fallback_lengths(text)

    def advance(self, char: str) -> bool:
        """Take one character; whether it completed the stop string."""
        length = self.num_matched
        while length and self.text[length] != char:
            length = self._fallback[length]
        if self.text[length] == char:
            length += 1
        self.num_matched = length
        return length == len(self.text)


def _fallback_lengths(text: str) -> list[int]:
    """For each prefix length, the length of the longest shorter prefix that is also its suffix."""
    lengths = [0] * (len(text) + 1)
    length = 0
    for position in range(1, len(text)):
        while length and text[length] != text[position]:
            length = lengths[length]
        if text[length] == text[position]:
            length += 1
        lengths[position + 1] = length
    return lengths
