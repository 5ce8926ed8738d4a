"""Traces of real services: when requests came, how long they were, and for one of them which prefixes they shared.

What they said is not in them, so prompts are random tokens of the same lengths. `benchmarks/traces/README.md` says what
is shipped; each format that its publishers use can be read too, packed with gzip or not.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path

import numpy as np

from benchmarks.datasets.request import LoadRequest, Workload, random_ids
from benchmarks.datasets.synthetic import token_requests
from benchmarks.datasets.text import PromptText

TRACES = Path(__file__).parents[1] / "traces"
AZURE_CONVERSATION = TRACES / "azure_2023_conv.csv.gz"
MOONCAKE_CONVERSATION = TRACES / "mooncake_conversation.csv.gz"
MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks, if the trace has them: requests with equal first names share that prefix."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Prompt and output tokens."""
        return self.num_prompt_tokens, self.num_output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """How a trace is replayed."""

    num_requests: int | None = None
    """From its start; None: all."""
    speedup: float = 1.0
    """Times are divided by it."""
    length_scale: float = 1.0
    """Lengths, and the blocks that prefixes consist of, are multiplied by it, for models with a shorter context."""
    max_total_len: int | None = None
    """Requests with more prompt and output tokens are left out."""

    def __post_init__(self) -> None:
        if self.speedup <= 0 or self.length_scale <= 0:
            raise ValueError("--speedup and --trace-length-scale have to be positive")


def open_text(path: Path) -> io.TextIOWrapper:
    """A text file, unpacked if its name ends with .gz. Raises ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"--dataset-path: there is no file {path}")
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def read_azure(path: Path) -> Iterator[TraceRow]:
    """Rows of the Azure LLM inference trace, as published or as shipped. Raises ValueError for other columns."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        if reader.fieldnames == ["arrival_s", "prompt_tokens", "output_tokens"]:
            for row in reader:
                yield TraceRow(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
        elif reader.fieldnames == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
            start_s: float | None = None
            for row in reader:
                at_s = _seconds(row["TIMESTAMP"])
                start_s = at_s if start_s is None else start_s
                yield TraceRow(at_s - start_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        else:
            raise ValueError(f"{path}: no Azure trace: it has the columns {reader.fieldnames}")


def _seconds(timestamp: str) -> float:
    """Of `2023-11-16 18:15:46.6805900`; a fraction has as many digits as it likes."""
    whole, _, fraction = timestamp.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def read_burstgpt(path: Path) -> Iterator[TraceRow]:
    """Rows of BurstGPT. Those that failed, which have no output, are left out. Raises ValueError for other columns."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        wanted = {"Timestamp", "Request tokens", "Response tokens"}
        if not wanted <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: no BurstGPT trace: it has the columns {reader.fieldnames}")
        start_s: float | None = None
        for row in reader:
            if int(row["Response tokens"]) > 0:
                at_s = float(row["Timestamp"])
                start_s = at_s if start_s is None else start_s
                yield TraceRow(at_s - start_s, int(row["Request tokens"]), int(row["Response tokens"]))


def read_mooncake(path: Path) -> Iterator[TraceRow]:
    """Rows of a Mooncake trace, as published (JSON lines) or as shipped. Raises ValueError for anything else."""
    with open_text(path) as file:
        first = file.readline()
        if first.strip() == "arrival_ms,prompt_tokens,output_tokens,blocks":
            for line in file:
                at_ms, prompt, output, blocks = line.rstrip("\n").split(",")
                yield TraceRow(int(at_ms) / 1000, int(prompt), int(output), _block_names(blocks))
            return
        for line in chain([first], file):
            yield _mooncake_row(line, path)


def _mooncake_row(line: str, path: Path) -> TraceRow:
    try:
        row = json.loads(line)
        blocks = tuple(int(name) for name in row["hash_ids"])
        return TraceRow(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{path}: no Mooncake trace: {line[:60]!r}") from exc


def _block_names(ranges: str) -> tuple[int, ...]:
    """Of `0 14-27`."""
    names: list[int] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        names += range(int(first), int(last or first) + 1)
    return tuple(names)


_READERS: dict[str, tuple[Callable[[Path], Iterator[TraceRow]], Path | None]] = {
    "azure": (read_azure, AZURE_CONVERSATION),
    "mooncake": (read_mooncake, MOONCAKE_CONVERSATION),
    "burstgpt": (read_burstgpt, None),
}


def trace_workload(
    name: str, path: Path | None, options: TraceOptions, *, vocab_size: int, seed: int, text: PromptText | None
) -> Workload:
    """A trace by its dataset name: azure, mooncake or burstgpt. path: None takes the shipped one.

    Raises ValueError for a file of another format, or where none is shipped.
    """
    read, shipped = _READERS[name]
    path = path or shipped
    if path is None:
        raise ValueError(f"--dataset-name {name} needs --dataset-path")
    rows = chosen(read(path), options)
    if not rows:
        raise ValueError(f"{path} has no request within the limits")
    if name == "mooncake":
        requests = block_requests(rows, options.length_scale, vocab_size=vocab_size, seed=seed, text=text)
    else:
        triples = ((row.arrival_s, row.num_prompt_tokens, row.num_output_tokens) for row in rows)
        requests = token_requests(triples, vocab_size=vocab_size, seed=seed, text=text)
    return Workload(num_requests=len(rows), requests=requests, has_times=True)


def chosen(rows: Iterator[TraceRow], options: TraceOptions) -> Sequence[TraceRow]:
    """The rows to replay, as they are replayed: scaled, from time 0."""
    scaled = (
        TraceRow(
            row.arrival_s / options.speedup,
            max(1, round(row.num_prompt_tokens * options.length_scale)),
            max(1, round(row.num_output_tokens * options.length_scale)),
            row.blocks,
        )
        for row in rows
    )
    limit = options.max_total_len
    fitting = (row for row in scaled if limit is None or row.num_prompt_tokens + row.num_output_tokens <= limit)
    return list(islice(fitting, options.num_requests))


def block_requests(
    rows: Sequence[TraceRow], length_scale: float, *, vocab_size: int, seed: int, text: PromptText | None
) -> Iterator[LoadRequest]:
    """Prompts that share with each other exactly the blocks that the trace says they share.

    A block's tokens are a function of its name and the seed alone, so nothing has to be kept. As text, lengths are
    those of the tokens only about, since the text's tokens are others.
    """
    ids_range = random_ids(text.tokenizer.vocab_size if text is not None else vocab_size)
    block_len = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale))
    for row in rows:
        ids: list[int] = []
        for name in row.blocks:
            rng = np.random.default_rng([seed, 3, name])
            ids += rng.integers(*ids_range, size=block_len).tolist()
        ids = _of_length(ids, row.num_prompt_tokens, np.random.default_rng([seed, 4, *row.blocks[-1:]]), ids_range)
        yield LoadRequest(
            prompt=ids if text is None else text.tokenizer.decode(ids),
            output_len=row.num_output_tokens,
            due_s=row.arrival_s,
        )


def _of_length(ids: list[int], length: int, rng: np.random.Generator, ids_range: tuple[int, int]) -> list[int]:
    """Cut, or filled up where rounding has left a token or two missing."""
    missing = max(0, length - len(ids))
    more: list[int] = rng.integers(*ids_range, size=missing).tolist()
    return ids[:length] + more
