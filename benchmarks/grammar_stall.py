"""What running requests feel when a request with a new, large schema arrives: time between their tokens, then and else.

One engine in this process. Some requests generate without a grammar; one after another, requests with a schema join
them and ask for a few tokens. Every other one has a schema that is new, the rest one that was there before.

    python -m benchmarks.grammar_stall --model demo:smollm2-135m-instruct --num-layers 2 --num-properties 500

`--num-layers` cuts the model, whose weights are made up then, for steps as short as those of a GPU.

One line of JSON says how long a running request waited from one token to the next: in quiet steps, and the longest time
in the steps behind each request with a new schema, and with one that is known; and how long those requests waited for
their first token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import EngineOutput, StepRunner
from atom_cluster.gang.local_gang import open_local_gang
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import CancelRequest, EngineRequest, GrammarSpec, SamplingParams, TokenBatch
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.runner.options import RunnerOptions

_CLIENT = "benchmark"
_PROMPT_TOKENS = 32
_APART = 12
"""Steps from one request with a schema to the next."""
_BEHIND = 6
"""Steps behind it that count as its own."""


class _Stopwatch:
    """An outbox that notes when tokens come."""

    def __init__(self) -> None:
        self.came_s: dict[str, list[float]] = {}

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        """Note each request's time."""
        now_s = time.perf_counter()
        for delta in message.deltas if isinstance(message, TokenBatch) else ():
            if delta.error is not None:
                raise SystemExit(f"{delta.request_id}: {delta.error.message}")
            self.came_s.setdefault(delta.request_id, []).append(now_s)


def large_schema(num_properties: int, number: int) -> GrammarSpec:
    """An object whose properties are all required, of several kinds; no two numbers have the same."""
    kinds: tuple[dict[str, object], ...] = (
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 99_999},
        {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        {"enum": [f"choice {index}" for index in range(8)]},
        {"type": "array", "items": {"type": "number"}, "maxItems": 5},
    )
    properties = {f"field_{number}_{index}": kinds[index % len(kinds)] for index in range(num_properties)}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return GrammarSpec(kind="json_schema", text=json.dumps(schema))


class _Run:
    """One engine and its requests."""

    def __init__(self, runner: StepRunner, *, num_running: int, num_tokens: int) -> None:
        self.watch = _Stopwatch()
        self._numbers = random.Random(0)
        self._vocab_size = runner.info.vocab_size
        self.core = EngineCore(
            runner=runner,
            outbox=self.watch,
            scheduler=SchedulerConfig(),
            transfer=KvTransferConfig(),
            metrics=NullMetrics(),
            peer=PeerAddress(peer_id="local", endpoint="", epoch=0),
        )
        self.running = [f"running {number}" for number in range(num_running)]
        for request_id in self.running:
            self.send(request_id, SamplingParams(seed=1, max_tokens=num_tokens, ignore_eos=True))

    def send(self, request_id: str, sampling: SamplingParams) -> float:
        """A request with a prompt of its own; when it was sent."""
        prompt = tuple(self._numbers.randrange(1, self._vocab_size) for _ in range(_PROMPT_TOKENS))
        request = EngineRequest(request_id=request_id, token_ids=prompt, sampling=sampling, eos_token_ids=(2,))
        self.core.put(_CLIENT, request)
        return time.perf_counter()

    def ask_for_schema(self, number: int, grammar: GrammarSpec) -> float:
        """Send a request with a schema, and what is left of the one before is cancelled; when it was sent."""
        self.core.put(_CLIENT, CancelRequest(f"schema {number - 1}"))
        return self.send(f"schema {number}", SamplingParams(seed=1, max_tokens=_BEHIND // 2, grammar=grammar))

    def tokens_of(self, request_id: str) -> int:
        """How many have come."""
        return len(self.watch.came_s.get(request_id, ()))

    def step_until(self, num_tokens: int, request_id: str | None = None) -> None:
        """Until a request has so many; None: the first running one."""
        while self.tokens_of(request_id or self.running[0]) < num_tokens:
            self.core.step(wait_s=0.001)


def measure(runner: StepRunner, *, num_properties: int, num_schemas: int, num_running: int) -> dict[str, object]:
    """Milliseconds; see the module's docstring."""
    run = _Run(runner, num_running=num_running, num_tokens=runner.info.max_model_len - _PROMPT_TOKENS)
    known = large_schema(num_properties, 0)
    run.ask_for_schema(-1, known)  # makes the vocabulary, too
    sent_s, at_token = [], []
    for number in range(2 * num_schemas):
        run.step_until(1, f"schema {number - 1}")
        run.step_until(run.tokens_of(run.running[0]) + _APART)
        at_token.append(run.tokens_of(run.running[0]))
        sent_s.append(run.ask_for_schema(number, known if number % 2 else large_schema(num_properties, number + 1)))
    run.step_until(1, f"schema {2 * num_schemas - 1}")
    run.step_until(run.tokens_of(run.running[0]) + _APART)
    came_s = run.watch.came_s[run.running[0]]
    gaps = [later - earlier for earlier, later in zip(came_s, came_s[1:])]
    longest = [max(gaps[at - 1 : at - 1 + _BEHIND]) for at in at_token]
    first = [run.watch.came_s[f"schema {number}"][0] - sent for number, sent in enumerate(sent_s)]
    return {
        "schema_kib": round(len(known.text) / 1024, 1),
        "quiet_ms": _summary([gap for at in at_token for gap in gaps[at - 1 + _BEHIND : at - 1 + _APART]]),
        "longest_behind_new_ms": _summary(longest[::2]),
        "longest_behind_known_ms": _summary(longest[1::2]),
        "first_token_of_new_ms": _summary(first[::2]),
        "first_token_of_known_ms": _summary(first[1::2]),
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds) * 1000, 1), "longest": round(max(seconds) * 1000, 1)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of LLMEngine")
    parser.add_argument("--num-layers", type=int, help="of the model; default: all, with its own weights")
    parser.add_argument("--num-properties", type=int, default=500)
    parser.add_argument("--num-schemas", type=int, default=20)
    parser.add_argument("--num-running", type=int, default=4)
    parser.add_argument("--num-threads", type=int, default=1, help="of the model's math")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = cut(resolve_model_path(arguments.model), Path(directory), arguments.num_layers)
        load_format: Literal["safetensors", "dummy"] = "dummy" if arguments.num_layers else "safetensors"
        options = RunnerOptions(model_dir=str(model), num_threads=arguments.num_threads, load_format=load_format)
        run(options, arguments)


def cut(model: Path, directory: Path, num_layers: int | None) -> Path:
    """Configuration and tokenizer of a model with so many layers, in `directory`; None: the model as it is."""
    if num_layers is None:
        return model
    for file in model.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    return directory


def run(options: RunnerOptions, arguments: argparse.Namespace) -> None:
    """Measure and print."""
    runner = open_local_gang(options, 1)
    try:
        found = measure(
            runner,
            num_properties=arguments.num_properties,
            num_schemas=arguments.num_schemas,
            num_running=arguments.num_running,
        )
    finally:
        runner.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
