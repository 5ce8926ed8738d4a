"""Prompts as token ids, and when to send them. The same arguments and seed give the same workload anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

FIRST_TOKEN_ID = 1000
"""Ids below are left out: special tokens live there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked for. Lengths in tokens."""

    num_requests: int
    input_len: int
    output_len: int
    prefix_len: int = 0
    """Leading tokens that a prompt shares with others; 0 makes all prompts unrelated."""
    num_prefixes: int = 1
    """Different shared prefixes; each prompt begins with one of them."""
    vocab_size: int = 30_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_len < self.input_len:
            raise ValueError(f"prefix_len {self.prefix_len} leaves nothing of input_len {self.input_len} to differ")
        if self.vocab_size <= FIRST_TOKEN_ID:
            raise ValueError(f"vocab_size {self.vocab_size} must be above {FIRST_TOKEN_ID}")


def make_prompts(workload: Workload) -> list[list[int]]:
    """One prompt of `input_len` token ids per request."""
    rng = random.Random(workload.seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN_ID, workload.vocab_size) for _ in range(count)]

    prefixes = [tokens(workload.prefix_len) for _ in range(workload.num_prefixes)]
    suffix_len = workload.input_len - workload.prefix_len
    return [rng.choice(prefixes) + tokens(suffix_len) for _ in range(workload.num_requests)]


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which requests are sent, without end: independent clients, `rate_per_s` on average."""
    rng = random.Random(seed)
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.expovariate(rate_per_s)
