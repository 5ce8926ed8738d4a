"""What each token of a model spells, in the form that grammars are compiled against."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import tokenizers
from llguidance import LLTokenizer

from atom_cluster.errors import ConfigError, InvalidRequest

_MARKER = "<|atom_cluster: the grammar is satisfied|>"
"""Name of a token that no tokenizer has: the library allows it where an output may end."""
_NUM_KEPT = 2
"""Vocabularies kept by a process. It serves one model; tests serve more."""


class Vocabulary:
    """A model's tokens. Immutable; one per model and process (`load_vocabulary`), as it is large.

    Made in 0.3 s for 49,000 tokens and in 1.6 s for 152,000, most of it with the interpreter lock held.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        """vocab_size: of the model, which may have more rows than there are tokens. `backend` is changed."""
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([tokenizers.AddedToken(_MARKER, special=True)])
        marker = backend.token_to_id(_MARKER)
        assert marker is not None, "it was just added"
        self.marker = marker
        """Id that stands in masks for the end of the output. Not a token: one of the model may have the same id, but
        then it spells nothing."""
        self.vocab_size = vocab_size
        self.num_words = (max(vocab_size, self.marker + 1) + 31) // 32
        """int32 words of a mask: one bit per token, the lowest bit of a word first."""
        self.library = LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, self.marker + 1), eos_token=self.marker)

    @classmethod
    def from_directory(cls, directory: str | Path, vocab_size: int) -> Vocabulary:
        """Read `tokenizer.json`. Raises `InvalidRequest` when there is none, `ConfigError` when it cannot be used.

        Tokens that only `tokenizer_config.json` knows are in no grammar.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequest("the model has no tokenizer.json, which structured output needs", param="grammar")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), vocab_size)
        except Exception as exc:  # both libraries raise bare Exception
            raise ConfigError(f"{path}: no grammar can be compiled for this tokenizer: {exc}") from exc


_lock = threading.Lock()
_kept: OrderedDict[tuple[str, int, int], Vocabulary] = OrderedDict()


def load_vocabulary(directory: str | Path, vocab_size: int) -> Vocabulary:
    """`Vocabulary.from_directory`, made once per process and file. Thread-safe."""
    path = Path(directory) / "tokenizer.json"
    key = (str(path), path.stat().st_mtime_ns if path.is_file() else 0, vocab_size)
    with _lock:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = Vocabulary.from_directory(directory, vocab_size)
            while len(_kept) > _NUM_KEPT:
                _kept.popitem(last=False)
        return found
