"""One request of a load, and a load as a stream of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FIRST_TOKEN_ID = 1000
"""Ids below are left out of random prompts: special tokens live there."""


def random_ids(vocab_size: int) -> tuple[int, int]:
    """Of random prompts: the first id that is drawn, and the first that is not. Raises ValueError for no vocabulary."""
    if vocab_size < 2:
        raise ValueError(f"--vocab-size {vocab_size} is no vocabulary")
    return min(FIRST_TOKEN_ID, vocab_size // 2), vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What to ask for. Exactly one of `prompt` and `messages` is given."""

    output_len: int
    """`max_tokens`."""
    prompt: str | Sequence[int] | None = None
    """Text, or token ids."""
    messages: Sequence[Mapping[str, str]] | None = None
    due_s: float | None = None
    """When the dataset has it sent, in seconds after the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests to send, made one by one while they are sent."""

    num_requests: int
    requests: Iterator[LoadRequest]
    has_times: bool = False
    """Whether every request has a `due_s`."""
