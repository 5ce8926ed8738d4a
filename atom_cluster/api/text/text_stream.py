"""Token ids of one output become text as they arrive: never half a character, never text that changes later.

Two ways, chosen by the tokenizer's decoder. Byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, DeepSeek) map every
token to fixed bytes, so an incremental UTF-8 decoder is exact. All others (SentencePiece, WordPiece) decide on spaces
from neighbouring tokens, so a short window of tokens is decoded again whenever one arrives.
Knows nothing of stop strings, requests or HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_MAX_CHARACTER_TOKENS = 4
"""A UTF-8 character has at most four bytes, and a byte-fallback token is one byte."""


class TextStream(Protocol):
    """Turns tokens into text, a few at a time."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens completed; may be empty."""
        ...

    def finish(self) -> str:
        """What was kept back, with U+FFFD for bytes that never became a character."""
        ...


class ByteText:
    """Text of a byte-level vocabulary. Constant work per token."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """`bytes_of` gives a token's bytes, empty for a token that is not shown."""
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `TextStream`."""
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def finish(self) -> str:
        """See `TextStream`."""
        return self._decoder.decode(b"", final=True)


class WindowText:
    """Text of any other vocabulary, from the difference of two decodings of a window that starts in shown text."""

    def __init__(
        self, decode: Callable[[list[int]], str], is_shown: Callable[[int], bool], *, before: int | None = None
    ) -> None:
        """`before`: the token in front of the text. If it is shown, the text's first token is not taken for the first
        one of all, whose leading space decoders strip."""
        self._decode = decode
        self._is_shown = is_shown
        self._window: list[int] = [before] if before is not None and is_shown(before) else []
        self._num_read = len(self._window)
        self._read_text = decode(self._window) if self._window else ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """See `TextStream`."""
        return "".join(self._feed_one(token_id) for token_id in token_ids if self._is_shown(token_id))

    def finish(self) -> str:
        """See `TextStream`."""
        return self._new_text() if len(self._window) > self._num_read else ""

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        new_text = self._new_text()
        num_kept_back = len(self._window) - self._num_read
        if new_text.endswith(REPLACEMENT) and num_kept_back < _MAX_CHARACTER_TOKENS:
            return ""
        self._advance()
        return new_text

    def _new_text(self) -> str:
        text = self._decode(self._window)
        if text.startswith(self._read_text):
            return text[len(self._read_text) :]
        # An invalid byte turned the whole run of bytes before it into U+FFFD. What was shown stays shown.
        return self._decode(self._window[self._num_read :])

    def _advance(self) -> None:
        """Start the window at what was just shown. It is never empty, so the next token is not taken for the first
        one of a text, whose leading space decoders strip."""
        self._window = self._window[self._num_read :]
        self._read_text = self._decode(self._window)
        self._num_read = len(self._window)
