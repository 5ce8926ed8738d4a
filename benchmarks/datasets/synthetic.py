"""Prompts that are made up: random tokens, and verse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.datasets.request import LoadRequest, Workload, random_ids
from benchmarks.datasets.text import PromptText

VERSE = Path(__file__).with_name("verse.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Lengths in tokens. Each is drawn evenly between `range_ratio` of the named one and that one."""

    input_len: int
    output_len: int
    range_ratio: float = 1.0
    prefix_len: int = 0
    """Shared tokens in front of `input_len`; not drawn."""
    num_prefixes: int = 1
    """Different shared prefixes; each prompt begins with one of them."""

    def __post_init__(self) -> None:
        if min(self.input_len, self.output_len, self.num_prefixes) < 1 or self.prefix_len < 0:
            raise ValueError("lengths have to be at least 1, --random-prefix-len at least 0")
        if not 0 <= self.range_ratio <= 1:
            raise ValueError("--random-range-ratio has to be from 0 to 1")

    def draw(self, rng: np.random.Generator, length: int, count: int) -> list[int]:
        """So many lengths, each at least 1."""
        low = max(1, int(length * self.range_ratio))
        lengths: list[int] = rng.integers(low, length + 1, size=count).tolist()
        return lengths


def random_workload(
    lengths: RandomLengths,
    *,
    num_requests: int,
    vocab_size: int,
    seed: int,
    text: PromptText | None,
    arrivals: Iterator[float] | None = None,
) -> Workload:
    """Random tokens behind a shared prefix; as token ids, or as text if there is a tokenizer.

    A chat template's tokens are taken off the input length. Raises ValueError for lengths that it leaves nothing of.
    """
    if text is not None:
        vocab_size = text.tokenizer.vocab_size
        lengths = _without(lengths, text.num_template_tokens)
    return Workload(
        num_requests=num_requests,
        requests=_random_requests(lengths, num_requests, _TokenSource(vocab_size, seed), text, arrivals),
        has_times=arrivals is not None,
    )


def _without(lengths: RandomLengths, num_template_tokens: int) -> RandomLengths:
    if num_template_tokens >= lengths.input_len:
        raise ValueError(f"the chat template alone has {num_template_tokens} tokens: raise --random-input-len")
    return RandomLengths(
        input_len=lengths.input_len - num_template_tokens,
        output_len=lengths.output_len,
        range_ratio=lengths.range_ratio,
        prefix_len=lengths.prefix_len,
        num_prefixes=lengths.num_prefixes,
    )


class _TokenSource:
    """Token ids of which none is a special one, in usual vocabularies."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 0])
        self._ids = random_ids(vocab_size)

    def tokens(self, count: int) -> list[int]:
        found: list[int] = self.rng.integers(*self._ids, size=count).tolist()
        return found


def _random_requests(
    lengths: RandomLengths,
    num_requests: int,
    source: _TokenSource,
    text: PromptText | None,
    arrivals: Iterator[float] | None,
) -> Iterator[LoadRequest]:
    prefixes = [source.tokens(lengths.prefix_len) for _ in range(lengths.num_prefixes)]
    input_lens = lengths.draw(source.rng, lengths.input_len, num_requests)
    output_lens = lengths.draw(source.rng, lengths.output_len, num_requests)
    for input_len, output_len in zip(input_lens, output_lens):
        prefix = prefixes[int(source.rng.integers(len(prefixes)))]
        ids = prefix + source.tokens(input_len)
        yield LoadRequest(
            prompt=ids if text is None else text.wrap(text.of_length(ids, source.rng)),
            output_len=output_len,
            due_s=None if arrivals is None else next(arrivals),
        )


def token_requests(
    rows: Iterator[tuple[float, int, int]], *, vocab_size: int, seed: int, text: PromptText | None
) -> Iterator[LoadRequest]:
    """Random prompts for rows of (seconds, prompt tokens, output tokens)."""
    source = _TokenSource(text.tokenizer.vocab_size if text is not None else vocab_size, seed)
    for at_s, input_len, output_len in rows:
        ids = source.tokens(max(1, input_len))
        prompt = ids if text is None else text.of_length(ids, source.rng)
        yield LoadRequest(prompt=prompt, output_len=max(1, output_len), due_s=at_s)


def sonnet_workload(
    *, num_requests: int, input_len: int, output_len: int, prefix_len: int, seed: int, text: PromptText | None
) -> Workload:
    """Verse: every prompt begins with the same lines, about `prefix_len` tokens of them, and goes on with lines drawn
    anew up to `input_len` tokens.

    Raises ValueError without a tokenizer, and for lengths that leave no line to draw.
    """
    if text is None:
        raise ValueError("--dataset-name sonnet counts tokens of text: name a --tokenizer")
    lines = VERSE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    line_tokens = [text.count(line + "\n") for line in lines]
    opening = "Continue in the same manner:\n\n"
    num_opening = text.count(text.wrap(opening))
    mean = sum(line_tokens) / len(lines)
    num_prefix_lines = max(0, round((prefix_len - num_opening) / mean))
    num_lines = round((input_len - num_opening) / mean)
    if num_lines <= num_prefix_lines:
        raise ValueError("--sonnet-input-len leaves no line behind --sonnet-prefix-len")

    def requests() -> Iterator[LoadRequest]:
        rng = np.random.default_rng([seed, 2])
        prefix = [lines[i % len(lines)] for i in range(num_prefix_lines)]
        while True:
            drawn = [lines[int(i)] for i in rng.integers(len(lines), size=num_lines - num_prefix_lines)]
            yield LoadRequest(prompt=text.wrap(opening + "\n".join(prefix + drawn) + "\n"), output_len=output_len)

    return Workload(num_requests=num_requests, requests=islice(requests(), num_requests))
