"""Tiny checkpoints with a tokenizer of single characters, for structured output."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.draft_models import draft_model_dir
from tests.tiny_models import VOCAB_SIZE

EOS_ID = 1


def character_tokenizer() -> tokenizers.Tokenizer:
    """Ids 0 to 2 are special; the others stand for one byte each, all of ASCII among them."""
    special = ["<s>", "</s>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The last few stand for bytes that text rarely has.
    vocab = {token: token_id for token_id, token in enumerate([*special, *alphabet[: VOCAB_SIZE - 3]])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


@cache
def structured_model_dir(name: str) -> Path:
    """The checkpoint of `draft_models.py` of this name, with such a tokenizer."""
    directory = Path(_session_dir().name) / name
    shutil.copytree(draft_model_dir(name), directory)
    character_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@cache
def _session_dir() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="atom-cluster-structured-")
