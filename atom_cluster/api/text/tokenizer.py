"""Stop 4 of 14: text becomes token ids, off the event loop. Next: serving/router.py.

Stop 14 uses it on the way back: `IncrementalDetokenizer` turns an output's token ids into text. Reads `tokenizer.json`
and `tokenizer_config.json` of a model directory with the `tokenizers` library alone. `Tokenizer` and
`IncrementalDetokenizer` work without an event loop. Knows nothing of requests or HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import tokenizers
import tokenizers.processors

from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.model_files import read_json, special_tokens
from atom_cluster.api.text.stop_strings import StopMatcher
from atom_cluster.api.text.text_stream import ByteText, TextStream, WindowText
from atom_cluster.errors import ConfigError, Overloaded

T = TypeVar("T")

_SLOW_FILES = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "spiece.model")
_TOKEN_OPTIONS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TYPICAL_MAX_CHARS_PER_TOKEN = 8
_PROBE_CHARS = 65536


class Tokenizer:
    """Text to token ids and back, for one model. Thread-safe; encoding releases the interpreter lock."""

    def __init__(self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str] | None = None) -> None:
        """`special_tokens`: texts of those that have a name, for chat templates."""
        # A file may carry the limits of the training run; prompts must be neither cut nor padded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Largest token id plus one."""
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        decoder = msgspec.json.decode(backend.to_str())["decoder"]
        self.is_byte_level = _is_byte_level(decoder)
        """Whether every token stands for fixed bytes, whatever its neighbours."""
        self._bytes_by_id: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, if present, `tokenizer_config.json`. Raises `ConfigError` naming the file."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: not found; {_what_to_do_about(Path(directory))}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer: {exc}") from exc
        config = read_json(Path(directory) / "tokenizer_config.json", default={})
        named = special_tokens(directory)
        _add_tokens(backend, config, named)
        _add_ends(backend, config, named)
        return cls(backend, special_tokens=named)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts those around it that the model's tokenizer prescribes."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def offsets(self, text: str) -> list[int]:
        """Where the tokens of `encode(text)` begin in it, in characters: each where the one before it ends.

        Tokens that are part of a character begin where it does, and those that are put around a text at its ends.
        """
        starts: list[int] = []
        last = end = 0
        for token_start, token_end in self._backend.encode(text).offsets:
            # Some tokenizers do not count the space that a token begins with.
            last = max(last, min(end, token_start))
            starts.append(last)
            end = max(end, token_end)
        return starts

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that the vocabulary lacks are skipped."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its vocabulary text."""
        return self._backend.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it; empty for an id without a token."""
        return str(self._backend.id_to_token(token_id) or "")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark, such as end of turn, rather than text."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token stands for, UTF-8; not necessarily whole characters. Empty for an id without a token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        known = self._bytes_by_id[token_id]
        if known is None:
            known = self._bytes_by_id[token_id] = self._compute_token_bytes(token_id)
        return known

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether a text certainly has more than `num_tokens` tokens, for work proportional to `num_tokens`.

        False means only that encoding it is affordable. Long text is encoded in pieces until those alone have twice
        as many tokens; the few tokens that a cut adds or hides are far below that margin.
        """
        if len(text) <= _TYPICAL_MAX_CHARS_PER_TOKEN * num_tokens:
            return False
        num_seen = 0
        for start in range(0, len(text), _PROBE_CHARS):
            num_seen += len(self._backend.encode(text[start : start + _PROBE_CHARS], add_special_tokens=False))
            if num_seen > 2 * num_tokens + _PROBE_CHARS // _TYPICAL_MAX_CHARS_PER_TOKEN:
                return True
        return False

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            values = [_BYTE_BY_CHAR.get(char) for char in token]
            # Added tokens are spelt out; the library takes any token outside the byte alphabet literally.
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if token_id in self._added_ids:
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.replace("\u2581", " ").encode()


class IncrementalDetokenizer:
    """Text of one output as its tokens arrive, cut before the first stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_strings: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        before: int | None = None,
    ) -> None:
        """`shown_ids`: special tokens that are text all the same. `before`: the token in front of the output, whose
        text goes on where that one's ended; None: the output is a text of its own."""
        self._stream = _text_stream(
            tokenizer, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids, before=before
        )
        self._stops = StopMatcher(stop_strings) if stop_strings else None
        self.num_tokens = 0
        """Tokens taken so far; those after the one that completed a stop string are not counted."""
        self.num_chars = 0
        """Characters decoded so far, including those kept back."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.matched if self._stops else None

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that these tokens make certain; empty after a stop string matched."""
        if self._stops is None:
            self.num_tokens += len(token_ids)
            text = self._stream.feed(token_ids)
            self.num_chars += len(text)
            return text
        pieces = []
        for token_id in token_ids:
            if self._stops.matched is not None:
                break
            self.num_tokens += 1
            text = self._stream.feed((token_id,))
            self.num_chars += len(text)
            pieces.append(self._stops.push(text))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.matched_stop is not None:
            return ""
        rest = self._stream.finish()
        self.num_chars += len(rest)
        return self._stops.push(rest) + self._stops.finish() if self._stops else rest


class TokenizerService:
    """A model's tokenizer and chat template with a bounded thread pool, so that neither holds up the event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        num_threads: int = 1,
        max_pending: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        """None for a model without one."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._max_pending = max_pending
        self._num_pending = 0

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, num_threads: int = 1, chat_template: str | Path | None = None
    ) -> TokenizerService:
        """Load tokenizer and chat template of a model directory; `chat_template` is a file to take that from instead.

        Raises `ConfigError` naming the file.
        """
        tokenizer = Tokenizer.from_directory(directory)
        template = ChatTemplate.from_directory(directory, special_tokens=tokenizer.special_tokens, file=chat_template)
        return cls(tokenizer, chat_template=template, num_threads=num_threads)

    async def run(self, work: Callable[[], T]) -> T:
        """Result of `work` in the pool. Raises `Overloaded` when `max_pending` jobs wait already."""
        if self._num_pending >= self._max_pending:
            raise Overloaded("too many prompts are waiting to be tokenized")
        self._num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._num_pending -= 1

    def close(self) -> None:
        """End the threads; jobs that have not started are dropped. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _text_stream(
    tokenizer: Tokenizer, *, skip_special_tokens: bool, shown_ids: frozenset[int], before: int | None
) -> TextStream:
    def is_hidden(token_id: int) -> bool:
        return skip_special_tokens and tokenizer.is_special(token_id) and token_id not in shown_ids

    def bytes_of(token_id: int) -> bytes:
        return b"" if is_hidden(token_id) else tokenizer.token_bytes(token_id)

    def decode(token_ids: list[int]) -> str:
        # Those that are hidden never come here.
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    if tokenizer.is_byte_level:
        return ByteText(bytes_of)
    return WindowText(decode, lambda token_id: bool(bytes_of(token_id)), before=before)


def _byte_by_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others are moved above U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_BY_CHAR = _byte_by_char()


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        steps = decoder["decoders"]
        return isinstance(steps, list) and len(steps) == 1 and _is_byte_level(steps[0])
    return decoder["type"] == "ByteLevel"


def _what_to_do_about(directory: Path) -> str:
    slow = [name for name in _SLOW_FILES if (directory / name).is_file()]
    if not slow:
        return "the model directory needs a fast tokenizer"
    return f"{slow[0]} has to be converted to it first: AutoTokenizer.from_pretrained(...).save_pretrained(...)"


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, object], named: dict[str, str]) -> None:
    """Add tokens that only `tokenizer_config.json` knows, as `transformers` does: in the order of their ids."""
    listed = config.get("added_tokens_decoder")
    entries = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    for _, entry in entries:
        if backend.token_to_id(entry["content"]) is None:
            options = {name: bool(entry.get(name, False)) for name in _TOKEN_OPTIONS}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])
    backend.add_special_tokens([text for text in named.values() if backend.token_to_id(text) is None])


def _add_ends(backend: tokenizers.Tokenizer, config: dict[str, object], named: dict[str, str]) -> None:
    """What `add_bos_token` and `add_eos_token` want around a text, where `tokenizer.json` does not put it.

    DeepSeek's files are so: their tokenizer class adds the token. That a key is false takes nothing away.
    """
    adds_bos, adds_eos = config.get("add_bos_token") is True, config.get("add_eos_token") is True
    if not adds_bos and not adds_eos:
        return
    plain, full = (backend.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    num_before = next(start for start in range(len(full) + 1) if full[start : start + len(plain)] == plain)
    before, after = full[:num_before], full[num_before + len(plain) :]
    bos = backend.token_to_id(named.get("bos_token", ""))
    eos = backend.token_to_id(named.get("eos_token", ""))
    first = [bos] if adds_bos and bos is not None and bos not in before else []
    last = [eos] if adds_eos and eos is not None and eos not in after else []
    if first or last:
        # One template for all: the library applies only the first of several.
        before, after = [*first, *before], [*after, *last]
        texts = {token_id: backend.id_to_token(token_id) for token_id in (*before, *after)}
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*map(texts.__getitem__, before), "$A", *map(texts.__getitem__, after)],
            special_tokens=[(text, token_id) for token_id, text in texts.items()],
        )
