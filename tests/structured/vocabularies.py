"""A vocabulary for tests: one token per byte, a few words, two special tokens."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from atom_cluster.structured.vocabulary import Vocabulary

WORDS = ('{"', '":', "yes", '"}', "true", " please", "  ")


def word_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: token_id for token_id, char in enumerate(alphabet)}
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in WORDS:
        vocab["".join(piece for piece, _ in spelt.pre_tokenize_str(word))] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = spelt
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<think>", "</think>", "<|end|>"])
    return tokenizer


@cache
def word_vocabulary() -> Vocabulary:
    """Three rows of the model stand for no token."""
    tokenizer = word_tokenizer()
    return Vocabulary(tokenizer, tokenizer.get_vocab_size() + 3)


def id_of(text: str) -> int:
    """Of a token that spells this."""
    tokenizer = word_tokenizer()
    spelt = "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    token_id = tokenizer.token_to_id(spelt)
    return tokenizer.token_to_id(text) if token_id is None else token_id


def ids_of(text: str) -> list[int]:
    """Byte by byte."""
    return [id_of(char) for char in text]


END = id_of("<|end|>")
