"""Tokenizers small enough to build in a test: a byte-level one, and one with SentencePiece's spaces and byte tokens."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS_ID = 257
VOCAB_SIZE = 258


def byte_level() -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255, in the order of the alphabet), then two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: token_id for token_id, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Words with a leading mark instead of spaces; what is not in the vocabulary becomes byte tokens."""
    words = ["\u2581", "\u2581the", "\u2581cat", "s", "a", "t", "e", "h", "c", "n", "."]
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{value:02X}>": value + 2 for value in range(256)}}
    vocab |= {word: 258 + index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def write_model_directory(directory: Path, *, max_model_len: int = 512) -> Path:
    """The JSON files of a model whose tokenizer is `byte_level`."""
    byte_level().save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}},
        "config.json": {"max_position_embeddings": max_model_len, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS_ID},
        "generation_config.json": {"do_sample": True, "temperature": 0.6, "eos_token_id": [EOS_ID]},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
