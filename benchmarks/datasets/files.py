"""Prompts from files that lie on this machine: ShareGPT, files of Hugging Face datasets, and one's own."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.datasets.request import LoadRequest, Workload
from benchmarks.datasets.text import PromptText
from benchmarks.datasets.traces import open_text

MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_PROMPT_FIELDS = ("prompt", "question", "instruction", "input", "text")
_ANSWER_FIELDS = ("answer", "output", "response", "completion")


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a file."""

    prompt: str
    answer: str | None = None


def sharegpt_workload(
    path: Path | None, *, num_requests: int, output_len: int | None, seed: int, text: PromptText | None
) -> Workload:
    """First turns of conversations in the file's order shuffled, each answered at the length of its second turn.

    As the field does, it leaves out prompts and answers of fewer than 4 tokens, prompts of more than 1024, and both
    together of more than 2048. output_len: instead of the second turn's. Raises ValueError without a tokenizer.
    """
    if path is None or text is None:
        raise ValueError("--dataset-name sharegpt needs --dataset-path and a --tokenizer")
    examples = [found for row in read_rows(path) if (found := _turns(row)) is not None]
    return _shuffled(examples, num_requests, output_len, seed, text, limits=(MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS))


def hf_workload(
    path: Path | None,
    *,
    subset: str | None,
    split: str | None,
    num_requests: int,
    output_len: int | None,
    seed: int,
    text: PromptText | None,
) -> Workload:
    """Examples of a dataset of the Hugging Face hub that was downloaded: its folder, or one of its files.

    Conversations, or the first of the usual fields that is there. Raises ValueError when the folder has no such split,
    and when there is neither an answer nor an output length to go by.
    """
    if path is None or (text is None and output_len is None):
        raise ValueError("--dataset-name hf needs --dataset-path, and a --tokenizer or --hf-output-len")
    files = hf_files(path, subset=subset, split=split)
    examples = [found for file in files for row in read_rows(file) if (found := _example(row)) is not None]
    return _shuffled(examples, num_requests, output_len, seed, text)


def hf_files(path: Path, *, subset: str | None, split: str | None) -> list[Path]:
    """Data files of a dataset. A subset is a folder or part of a file's name, and so is a split."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} is not on this machine; datasets are not downloaded here")
    found = [file for file in sorted(path.rglob("*")) if file.suffix in _SUFFIXES]
    for name in (subset, split):
        found = [file for file in found if name is None or name in str(file.relative_to(path))]
    if not found:
        raise ValueError(f"{path} has no data file of subset {subset} and split {split}")
    return found


def custom_workload(path: Path | None, *, num_requests: int | None, default_output_len: int) -> Workload:
    """JSON lines, in their order: `prompt` (text or token ids) or `messages`; if wanted, `output_tokens`, and as `at_s`
    when. num_requests: None: all. Raises ValueError naming the line that is wrong.
    """
    if path is None:
        raise ValueError("--dataset-name custom needs --dataset-path")
    with open_text(path) as file:
        lines = [line for line in file if line.strip()][:num_requests]
    requests = [_custom(line, number, default_output_len) for number, line in enumerate(lines, start=1)]
    due_s = [request.due_s for request in requests if request.due_s is not None]
    if due_s and (len(due_s) < len(requests) or due_s != sorted(due_s) or due_s[0] < 0):
        raise ValueError("--dataset-path: at_s has to be given for all requests or for none, in order, from 0 on")
    return Workload(num_requests=len(requests), requests=iter(requests), has_times=bool(due_s))


def _custom(line: str, number: int, default_output_len: int) -> LoadRequest:
    try:
        row = json.loads(line)
        known = {"prompt", "messages", "output_tokens", "at_s"}
        if unknown := row.keys() - known:
            raise ValueError(f"unknown fields {sorted(unknown)}; known are {sorted(known)}")
        if ("prompt" in row) == ("messages" in row):
            raise ValueError("exactly one of prompt and messages is needed")
        return LoadRequest(
            prompt=row.get("prompt"),
            messages=row.get("messages"),
            output_len=int(row.get("output_tokens", default_output_len)),
            due_s=None if row.get("at_s") is None else float(row["at_s"]),
        )
    except (ValueError, AttributeError, TypeError) as exc:
        raise ValueError(f"--dataset-path, request {number}: {exc}") from exc


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Examples of one file by its name's end: JSON lines, a JSON list, CSV, or Parquet where pyarrow is installed."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with open_text(path) as file:
        if suffix == ".csv":
            yield from csv.DictReader(file)
        elif suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        else:
            rows = json.load(file)
            if not isinstance(rows, list):
                raise ValueError(f"{path} is not a JSON list")
            yield from rows


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet  # not a dependency: only these files need it
    except ImportError as exc:
        raise ValueError(f"{path}: Parquet needs pyarrow, which is not installed") from exc
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _turns(row: Mapping[str, Any]) -> Example | None:
    """The first two turns of a conversation, in either way that they are written; None: it has fewer."""
    turns = row.get("conversations") or row.get("messages") or ()
    texts = [str(turn.get("value", turn.get("content", ""))) for turn in turns if isinstance(turn, dict)]
    return Example(texts[0], texts[1]) if len(texts) >= 2 else None


def _example(row: Mapping[str, Any]) -> Example | None:
    if "conversations" in row or "messages" in row:
        return _turns(row)
    prompt = next((row[name] for name in _PROMPT_FIELDS if isinstance(row.get(name), str)), None)
    answer = next((row[name] for name in _ANSWER_FIELDS if isinstance(row.get(name), str)), None)
    return None if not prompt else Example(prompt, answer)


def _shuffled(
    examples: Sequence[Example],
    num_requests: int,
    output_len: int | None,
    seed: int,
    text: PromptText | None,
    *,
    limits: tuple[int, int] | None = None,
) -> Workload:
    """So many of them that fit, drawn without repeating any until all were."""
    if output_len is None and not any(example.answer for example in examples):
        raise ValueError("the dataset has no answers: name an output length")
    order = list(examples)
    random.Random(seed).shuffle(order)
    found: list[LoadRequest] = []
    for example in order:
        if len(found) == num_requests:
            break
        request = _request(example, output_len, text, limits)
        if request is not None:
            found.append(request)
    if not found:
        raise ValueError("the dataset has no example within the limits")
    repeated = (found[index % len(found)] for index in range(num_requests))
    return Workload(num_requests=num_requests, requests=repeated)


def _request(
    example: Example, output_len: int | None, text: PromptText | None, limits: tuple[int, int] | None
) -> LoadRequest | None:
    length = output_len
    if length is None and text is not None and example.answer:
        length = text.count(example.answer)
    if length is None or (output_len is None and length < MIN_TOKENS):
        return None
    if text is None:
        return LoadRequest(prompt=example.prompt, output_len=length)
    if limits is not None:
        num_prompt = text.count(example.prompt)
        if num_prompt < MIN_TOKENS or num_prompt > limits[0] or num_prompt + length > limits[1]:
            return None
    return LoadRequest(prompt=text.wrap(example.prompt), output_len=length)
