"""How many of a task's questions a model answers rightly, against a server or in this process.

    python -m benchmarks.accuracy --model demo:smollm2-135m-instruct
    python -m benchmarks.accuracy --base-url http://127.0.0.1:8000 --tasks arithmetic questions
    python -m benchmarks.accuracy --base-url http://127.0.0.1:8000 --catalogue-model DeepSeek-R1-0528 \\
        --dataset-path gsm8k/test.jsonl

With `--catalogue-model` tasks, examples and thresholds are those of `benchmarks/accuracy/models_accuracy.json`, and the
exit status is 1 if one is missed. Greedy, so the same build gives the same figure. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import aiohttp
import msgspec

from benchmarks.accuracy.catalogue import CATALOGUE, Entry, entries_of, read_catalogue
from benchmarks.accuracy.tasks import Task, make_task
from benchmarks.client import ApiClient
from benchmarks.datasets.request import LoadRequest
from benchmarks.endpoints import Asking, CompletionsEndpoint
from benchmarks.records import save_record
from benchmarks.server_metrics import parse, speculation

DEFAULT_TASKS = ("arithmetic", "questions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One task."""

    task: str
    num_questions: int
    num_right: int
    duration_s: float
    acceptance_rate: float | None = None
    """Share of drafts kept, from a server that speculates."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_questions

    @property
    def standard_error(self) -> float:
        """Of the share, if questions were drawn by chance."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.num_questions - 1))


class Model(Protocol):
    """Answers prompts greedily."""

    def answer(self, task: Task) -> tuple[list[str], float | None]:
        """An answer per question, and the share of drafts kept if that is known. Raises ValueError if one fails."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class LocalModel:
    """A model in this process."""

    def __init__(self, model: str, *, device: str, num_threads: int) -> None:
        """Loads it."""
        from atom_cluster import LLMEngine

        self._engine = LLMEngine(model, device=device, num_threads=num_threads)  # type: ignore[arg-type]

    def answer(self, task: Task) -> tuple[list[str], float | None]:
        """See `Model`."""
        from atom_cluster import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=task.max_tokens, stop_strings=task.stop)
        outputs = self._engine.generate([question.prompt for question in task.questions], params)
        return [output["text"] for output in outputs], None

    def close(self) -> None:
        """See `Model`."""
        self._engine.close()


class ServedModel:
    """A model behind /v1/completions."""

    def __init__(self, base_url: str, *, model: str | None, api_key: str | None, concurrency: int) -> None:
        self._base_url = base_url
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency = concurrency

    def answer(self, task: Task) -> tuple[list[str], float | None]:
        """See `Model`."""
        return asyncio.run(self._answer(task))

    def close(self) -> None:
        """Nothing is kept between tasks."""

    async def _answer(self, task: Task) -> tuple[list[str], float | None]:
        endpoint = CompletionsEndpoint()
        client = ApiClient(self._base_url, endpoint, timeout_s=600.0, headers=self._headers, keep_text=True)
        slots = asyncio.Semaphore(self._concurrency)
        try:
            model = self._model or (await client.get_json("/v1/models"))["data"][0]["id"]
            asking = Asking(model=model, extra={"stop": list(task.stop)})

            async def one(prompt: str) -> str:
                request = LoadRequest(prompt=prompt, output_len=task.max_tokens)
                async with slots:
                    record = await client.send(endpoint.body(request, asking))
                # An answer may be empty and right to end at once: then there is no output, and no error either.
                if record.error is not None:
                    raise ValueError(f"a question was not answered: {record.error}")
                return record.text or ""

            before = parse(await _metrics(client))
            answers = await asyncio.gather(*(one(question.prompt) for question in task.questions))
            return list(answers), speculation(before, parse(await _metrics(client)))[1]
        finally:
            await client.close()


async def _metrics(client: ApiClient) -> str:
    try:
        return await client.get_text("/metrics")
    except aiohttp.ClientError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, print, save if asked to."""
    args = parse_arguments(arguments)
    try:
        entries = entries_of(read_catalogue(args.catalogue), args.catalogue_model) if args.catalogue_model else []
        tasks = [_task_of(args, entry) for entry in entries] or [_named_task(args, name) for name in args.tasks]
        with contextlib.closing(_model_of(args)) as model:
            scores = [score(model, task) for task in tasks]
    except (ValueError, aiohttp.ClientError, msgspec.DecodeError) as exc:
        print(f"benchmarks.accuracy: {exc}", file=sys.stderr)
        return 2
    failures = print_scores(scores, entries)
    if args.save:
        details = {"scores": [{**asdict(one), "accuracy": one.accuracy} for one in scores]}
        label = args.catalogue_model or args.model or "server"
        print(f"saved {save_record('accuracy', label.rpartition(':')[2].replace('/', '_'), details)}")
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base-url", help="ask a server; else --model is loaded here")
    parser.add_argument("--model", help="directory or demo:NAME; with --base-url the name to ask for")
    parser.add_argument("--api-key")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), help="arithmetic questions gsm8k human_eval")
    parser.add_argument("--num-fewshot", type=int, default=3, help="examples in front of each question")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--dataset-path", type=Path, help="JSON lines with question and answer, as GSM8K has them")
    parser.add_argument("--execute-code", action="store_true", help="let human_eval run what the model writes")
    parser.add_argument("--catalogue-model", metavar="NAME", help="check this model's thresholds")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE)
    parser.add_argument("--concurrency", type=int, default=16, help="questions at a time, of a server")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    args = parser.parse_args(arguments)
    if args.base_url is None and args.model is None:
        parser.error("name a --base-url or a --model")
    return args


def _task_of(args: argparse.Namespace, entry: Entry) -> Task:
    limit = args.limit if args.limit is not None else entry.limit
    path = args.dataset_path if entry.task == "gsm8k" else None
    return make_task(
        entry.task,
        num_fewshot=entry.num_fewshot,
        limit=limit,
        dataset_path=path,
        executes_code=args.execute_code,
    )


def _named_task(args: argparse.Namespace, name: str) -> Task:
    path = args.dataset_path if name == "gsm8k" else None
    return make_task(
        name, num_fewshot=args.num_fewshot, limit=args.limit, dataset_path=path, executes_code=args.execute_code
    )


def _model_of(args: argparse.Namespace) -> Model:
    if args.base_url is None:
        return LocalModel(args.model, device=args.device, num_threads=args.threads)
    return ServedModel(args.base_url, model=args.model, api_key=args.api_key, concurrency=args.concurrency)


def score(model: Model, task: Task) -> Score:
    """Ask all questions and check the answers."""
    begun_s = time.monotonic()
    answers, acceptance_rate = model.answer(task)
    num_right = sum(question.check(answer) for question, answer in zip(task.questions, answers, strict=True))
    return Score(
        task=task.name,
        num_questions=len(task.questions),
        num_right=num_right,
        duration_s=time.monotonic() - begun_s,
        acceptance_rate=acceptance_rate,
    )


def print_scores(scores: Sequence[Score], entries: Sequence[Entry]) -> int:
    """A line each; how many thresholds were missed. entries: of the scores, in the same order; or none."""
    num_missed = 0
    for index, one in enumerate(scores):
        line = (
            f"{one.task:12} {one.num_right:4} of {one.num_questions:4}  {one.accuracy:.4f} ± {one.standard_error:.4f}"
        )
        if one.acceptance_rate is not None:
            line += f"  drafts kept {one.acceptance_rate:.1%}"
        if entries:
            missed = misses(one, entries[index])
            num_missed += bool(missed)
            line += f"  threshold {entries[index].accuracy_threshold:.4f}  {missed or 'reached'}"
        print(line)
    return num_missed


def misses(found: Score, entry: Entry) -> str:
    """What of an entry was missed, in words; empty if nothing was."""
    if found.accuracy < entry.accuracy_threshold:
        return "MISSED"
    wanted = entry.acceptance_threshold
    if wanted is not None and (found.acceptance_rate is None or found.acceptance_rate < wanted):
        return f"MISSED: of its drafts {wanted:.1%} have to be kept"
    return ""


if __name__ == "__main__":
    sys.exit(main())
