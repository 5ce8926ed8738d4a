"""Two engines, one prefill and one decode or both unified: what the transfer costs, and what is gained.

    python -m benchmarks.disaggregation --model shape:llama_8b --rates 16 24 32 --save
    python -m benchmarks.disaggregation --model demo:smollm2-135m-instruct --threads 1 --prompts 64 400 \\
        --rates 0.5 --num-warmup 8 --window-s 20 --shorten 8 --ttft-s 8 --itl-s 0.5

Three parts, on two GPUs, or on CPUs with a small model as a rehearsal:

exposed   single prompts through prefill and decode. `publish` is the time from the last chunk's end to the publication
          that brings the first token, `read` from there to the end of the last read, before which the second token
          cannot be computed; the two engines' own clocks and metrics. What a chunk's reads hide behind the next chunk
          is in neither. `unified` is the same prompt on one engine alone.
equal     the same requests, greedy and sampled, through both engines and through the first alone, one at a time: the
          same kernels and chunks, so ids are to be equal, and log probabilities to the last bit: the exit status is 1
          if they are not, or if nothing went from one engine to the other.
goodput   a trace (benchmarks/traces) at several rates, the same requests for both layouts: requests per second that
          keep the promise, TTFT 2 s and 50 ms between tokens on average (benchmarks/goodput.py). Placed by the
          router's policy, which for two unified engines spreads them by load.

No Ray and no HTTP (benchmarks/engines.py). Both layouts have the same two processes, whose roles change.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.messages.cluster import MemberCard, Role, RouteDecision
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.observability.metrics import (
    KERNELS_COMPILED,
    KV_EXPOSED_S,
    KV_PUBLISH_S,
    KV_TRANSFER_BYTES,
    KV_TRANSFER_FAILURES,
    PREEMPTIONS,
    STEP_S,
)
from atom_cluster.runner.options import RunnerOptions
from benchmarks.client import RequestRecord
from benchmarks.disaggregation_report import Equal, Exposed, Results
from benchmarks.engines import Answer, EngineProcess, FrontEnd, Numbers, TimedStep, new_secret
from benchmarks.goodput import (
    Promise,
    TimedRequest,
    judge,
    random_prompt,
    read_trace,
    replay,
    scaled,
)
from benchmarks.shapes import model_dir

DISAGGREGATED: tuple[Role, Role] = ("prefill", "decode")
UNIFIED: tuple[Role, Role] = ("unified", "unified")
LAYOUTS = {"disaggregated": DISAGGREGATED, "unified": UNIFIED}

_SETTLE_S = 0.3
_NUM_LONGEST = 8
"""Of an engine's steps, told one by one."""
_LEAST_PROMPT = 64
"""Tokens a row, on average, of steps that are taken to compute prompts alone."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print as it comes, and save if asked to. The exit status."""
    args = parse_arguments(arguments)
    directory = model_dir(args.model)
    secret = new_secret()
    begun_s = time.perf_counter()
    engines = [EngineProcess(f"engine-{i}", runner_options(args, directory, i, secret)) for i in range(2)]
    try:
        infos = [engine.wait() for engine in engines]
        start_s = time.perf_counter() - begun_s
        for name, choice in infos[0].choices.items():
            print(f"{name}: {choice}")
        print(f"started in {start_s:.1f} s", flush=True)
        details = {"start_s": start_s, "choices": dict(infos[0].choices)}
        results = Results(label=args.label or directory.name, is_saved=args.save, details=details)
        for layout in args.layouts:
            Run(args, engines, infos[0], secret=secret, layout=layout, results=results).run()
        results.compare()
    finally:
        for engine in engines:
            engine.close()
    return 0 if results.is_equal else 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, hub id, demo:NAME or shape:NAME")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--parts", choices=["exposed", "equal", "goodput"], nargs="+", help="all if not given")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 8000, 32000], help="tokens of single prompts")
    parser.add_argument("--repeats", type=int, default=5, help="of single prompts")
    parser.add_argument("--num-warmup", type=int, default=150, help="requests beforehand that are not measured")
    parser.add_argument("--trace", type=Path, help="like the Azure trace, of which a part is the default")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[16.0, 24.0], help="requests per second, both engines"
    )
    parser.add_argument("--window-s", type=float, default=15.0, help="in which the requests of a rate arrive")
    parser.add_argument("--drain-s", type=float, default=12.0, help="for what has not ended after the last arrival")
    parser.add_argument("--shorten", type=float, default=1.0, help="divide the trace's lengths, on slow machines")
    parser.add_argument("--ttft-s", type=float, default=2.0, help="promised")
    parser.add_argument("--itl-s", type=float, default=0.05, help="promised")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--transport", default="auto", help="kv_transfer.transport")
    parser.add_argument(
        "--always-remote", action="store_true", help="no conditional disaggregation: prefill computes all prompts"
    )
    parser.add_argument("--max-itl-s", type=float, help="scheduler.max_itl_s of all engines")
    parser.add_argument("--max-model-len", type=int, default=34000)
    parser.add_argument("--max-num-requests", type=int, default=384)
    parser.add_argument("--prefill-tokens", type=int, default=4096, help="budget of a prefill engine's step")
    parser.add_argument("--decode-tokens", type=int, default=4096, help="budget of a decode engine's step")
    parser.add_argument("--unified-tokens", type=int, default=4096, help="budget of a unified engine's step")
    parser.add_argument("--graph-mode", choices=["full_and_piecewise", "full", "none"], default="full_and_piecewise")
    parser.add_argument("--capture-sizes", type=int, nargs="+", help="rows of decode steps to capture")
    parser.add_argument("--memory-fraction", type=float, default=0.85)
    parser.add_argument("--threads", type=int, help="compute threads of each engine on CPUs")
    parser.add_argument("--label", help="name of the saved result; the model's if not given")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results, after every part")
    return parser.parse_args(arguments)


def runner_options(args: argparse.Namespace, directory: Path, index: int, secret: bytes) -> RunnerOptions:
    """Of the engine with this number; on GPUs it has the GPU of this number."""
    has_weights = any(directory.glob("*.safetensors")) or any(directory.glob("*.gguf"))
    sizes = None if args.capture_sizes is None else tuple(args.capture_sizes)
    return RunnerOptions(
        model_dir=str(directory),
        dtype=args.dtype,
        device=args.device,
        device_index=index,
        max_num_requests=args.max_num_requests,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=max(args.prefill_tokens, args.decode_tokens, args.unified_tokens),
        memory_fraction=args.memory_fraction,
        kv_dtype=args.kv_dtype,
        compilation=CompilationConfig(graph_mode=args.graph_mode, capture_sizes=sizes),
        num_threads=args.threads,
        load_format="safetensors" if has_weights else "dummy",
        kv_transport=args.transport,
        secret=secret,
    )


class Run:
    """One layout's turn."""

    def __init__(
        self,
        args: argparse.Namespace,
        engines: Sequence[EngineProcess],
        info: RunnerInfo,
        *,
        secret: bytes,
        layout: str,
        results: Results,
    ) -> None:
        self._args = args
        self._engines = engines
        self._vocab_size = info.vocab_size
        self._layout = layout
        self._results = results
        self._secret = secret
        self._transfer = KvTransferConfig(transport=args.transport, conditional_prefill=not args.always_remote)

    def run(self) -> None:
        """Give the engines their roles and measure. What they learn of their speed while they warm up is forgotten:
        steps that wait for a compiler say nothing of later ones."""
        asyncio.run(self._with_front_end(self._warm_up))
        asyncio.run(self._with_front_end(self._measure))

    async def _with_front_end(self, work: Callable[[FrontEnd, Sequence[MemberCard]], Awaitable[None]]) -> None:
        cards = [engine.serve(self._settings(i)) for i, engine in enumerate(self._engines)]
        front = FrontEnd(cards, secret=self._secret, transfer=self._transfer)
        await front.start()
        try:
            await work(front, cards)
        finally:
            await front.close()

    def _settings(self, index: int) -> EngineHostSettings:
        role = LAYOUTS[self._layout][index]
        budget = {
            "prefill": self._args.prefill_tokens,
            "decode": self._args.decode_tokens,
            "unified": self._args.unified_tokens,
        }[role]
        return EngineHostSettings(
            peer_id=f"{role}-{index}",
            role=role,
            model=self._args.model,
            secret=self._secret,
            scheduler=SchedulerConfig(
                max_num_requests=self._args.max_num_requests,
                max_num_batched_tokens=budget,
                max_waiting_requests=100_000,
                max_itl_s=self._args.max_itl_s,
            ),
            transfer=self._transfer,
            prefix_caching=False,
        )

    async def _measure(self, front: FrontEnd, cards: Sequence[MemberCard]) -> None:
        parts = self._args.parts or ["exposed", "equal", "goodput"]
        if self._layout == "disaggregated":
            both = RouteDecision(query_id=0, decode=cards[1].address, prefill=cards[0].address)
            alone = RouteDecision(query_id=0, decode=cards[0].address)
            if "exposed" in parts:
                await self._measure_exposed(front, both, alone)
            if "equal" in parts:
                await self._compare_outputs(front, both, alone)
        if "goodput" in parts:
            await self._measure_goodput(front)

    def _numbers(self) -> list[Numbers]:
        return [engine.numbers() for engine in self._engines]

    async def _warm_up(self, front: FrontEnd, cards: Sequence[MemberCard]) -> None:
        """The trace's last requests: to each engine alone and all at once, then as the router says and at a rate, so
        that kernels of all sizes of steps are compiled, and engines have met."""
        args = self._args
        begun_s = time.perf_counter()
        window_s = args.num_warmup / args.rates[0]
        requests = scaled(
            read_trace(args.trace)[-args.num_warmup :],
            rate_per_s=args.rates[0],
            window_s=window_s,
            vocab_size=self._vocab_size,
            seed=-1,
            shorten=args.shorten,
        )
        alone = [RouteDecision(query_id=0, decode=card.address) for card in cards]
        answers = await asyncio.gather(
            *(
                front.generate(request.prompt, _sampling(min(16, request.num_output_tokens)), decision=decision)
                for request in requests
                for decision in alone
            )
        )
        seen = await replay(requests, _sender(front), cut=front.cut, drain_s=1.0)
        errors = [record.error for record in (*(a.record for a in answers), *(s.record for s in seen)) if record.error]
        seconds = time.perf_counter() - begun_s
        print(f"{self._layout}: warm after {seconds:.1f} s, {len(errors)} errors {errors[:1]}", flush=True)

    # --- exposed

    async def _measure_exposed(self, front: FrontEnd, both: RouteDecision, alone: RouteDecision) -> None:
        rows = []
        for length in self._args.prompts:
            rows.append(await self._exposed(front, both, alone, length))
            print(rows[-1], flush=True)
        self._results.add(exposed=[asdict(row) for row in rows])

    async def _exposed(self, front: FrontEnd, both: RouteDecision, alone: RouteDecision, length: int) -> Exposed:
        ttfts_ms, publishes_ms, reads_ms, unified_ms, num_bytes = [], [], [], [], []
        num_handed_over = 0.0
        rng = random.Random(length)
        # The first round warms up what this length needs.
        for index in range(self._args.repeats + 1):
            prompt = random_prompt(rng, length, self._vocab_size)
            before = self._numbers()
            answer = await _checked(front.generate(prompt, _sampling(4), decision=both))
            after = self._numbers()
            local = await _checked(front.generate(prompt, _sampling(4), decision=alone))
            if not index:
                continue
            ttfts_ms.append(_ttft_ms(answer))
            unified_ms.append(_ttft_ms(local))
            publishes_ms.append(1e3 * _difference(before, after, f"{KV_PUBLISH_S.name}_sum"))
            reads_ms.append(1e3 * _difference(before, after, f"{KV_EXPOSED_S.name}_sum"))
            num_bytes.append(_difference(before, after, KV_TRANSFER_BYTES.name))
            num_handed_over += _difference(before, after, f"{KV_EXPOSED_S.name}_count")
        return Exposed(
            num_prompt_tokens=length,
            ttft_ms=statistics.median(ttfts_ms),
            publish_ms=statistics.median(publishes_ms),
            read_ms=statistics.median(reads_ms),
            share_of_ttft=statistics.median((p + r) / t for p, r, t in zip(publishes_ms, reads_ms, ttfts_ms)),
            unified_ttft_ms=statistics.median(unified_ms),
            num_handed_over=int(num_handed_over),
            num_bytes=statistics.median(num_bytes),
        )

    # --- equal

    async def _compare_outputs(self, front: FrontEnd, both: RouteDecision, alone: RouteDecision) -> None:
        greedy = _sampling(32, logprobs=0)
        sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=32, ignore_eos=True, logprobs=0)
        shortest = min(self._args.prompts)
        first = max(self._transfer.min_remote_tokens, shortest // 3)
        lengths = [first, shortest, *(length for length in self._args.prompts if length > shortest)]
        before = self._numbers()
        num_requests, num_equal, largest = 0, 0, 0.0
        for length in lengths:
            prompt = random_prompt(random.Random(-length), length, self._vocab_size)
            for sampling in (greedy, sampled):
                theirs = await _checked(front.generate(prompt, sampling, decision=both))
                ours = await _checked(front.generate(prompt, sampling, decision=alone))
                num_requests += 1
                num_equal += theirs.token_ids == ours.token_ids
                largest = max(largest, _logprob_difference(theirs, ours))
        after = self._numbers()
        found = Equal(
            num_requests=num_requests,
            num_equal=num_equal,
            largest_logprob_difference=largest,
            num_handed_over=int(_difference(before, after, f"{KV_EXPOSED_S.name}_count")),
        )
        print(found, flush=True)
        self._results.is_equal = found.is_right
        self._results.add(equal=asdict(found))

    # --- goodput

    async def _measure_goodput(self, front: FrontEnd) -> None:
        args = self._args
        promise = Promise(ttft_s=args.ttft_s, itl_s=args.itl_s)
        rows = read_trace(args.trace)
        found = self._results.goodputs.setdefault(self._layout, [])
        details = []
        for rate in args.rates:
            requests = scaled(
                rows, rate_per_s=rate, window_s=args.window_s, vocab_size=self._vocab_size, shorten=args.shorten
            )
            before, places = self._numbers(), front.places()
            for engine in self._engines:
                engine.steps()  # of before
            seen = await replay(requests, _sender(front), cut=front.cut, drain_s=args.drain_s)
            after = self._numbers()
            places = {place: count - places[place] for place, count in front.places().items() if count > places[place]}
            found.append(judge(seen, window_s=args.window_s, promise=promise))
            work = self._work(before, after)
            steps = {engine.name: _told(engine.steps()) for engine in self._engines}
            print(f"{self._layout:14} {found[-1]}\n{'':14} {places} {work}\n{'':14} {steps}", flush=True)
            details.append({**asdict(found[-1]), "work": work, "places": places, "steps": steps})
            self._results.add(**{f"goodput_{self._layout}": details})
            await asyncio.sleep(_SETTLE_S)  # what was cut is on its way out of the engines

    def _work(self, before: Sequence[Numbers], after: Sequence[Numbers]) -> dict[str, float]:
        """What the engines did meanwhile, by their metrics."""
        num_handed_over = _difference(before, after, f"{KV_EXPOSED_S.name}_count")
        work = {
            "handed_over": num_handed_over,
            "publish_ms": 1e3 * _difference(before, after, f"{KV_PUBLISH_S.name}_sum") / max(1, num_handed_over),
            "read_ms": 1e3 * _difference(before, after, f"{KV_EXPOSED_S.name}_sum") / max(1, num_handed_over),
            "read_gb": _difference(before, after, KV_TRANSFER_BYTES.name) / 1e9,
            "failures": _difference(before, after, KV_TRANSFER_FAILURES.name),
            "preemptions": _difference(before, after, PREEMPTIONS.name),
            "kernels_compiled": _difference(before, after, KERNELS_COMPILED.name),
        }
        for engine, old, new in zip(self._engines, before, after):
            count = _difference([old], [new], f"{STEP_S.name}_count")
            work[f"{engine.name}_busy_s"] = _difference([old], [new], f"{STEP_S.name}_sum")
            work[f"{engine.name}_steps"] = count
            work[f"{engine.name}_steps_over_0.5_s"] = count - _difference([old], [new], f"{STEP_S.name}_bucket<=0.5")
        return {name: round(value, 3) for name, value in work.items()}


def _sender(front: FrontEnd) -> Callable[[TimedRequest, float], Awaitable[tuple[RequestRecord, bool]]]:
    async def send(request: TimedRequest, due_s: float) -> tuple[RequestRecord, bool]:
        answer = await front.generate(request.prompt, _sampling(request.num_output_tokens), due_s=due_s)
        return answer.record, answer.is_cut

    return send


def _sampling(max_tokens: int, *, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)


async def _checked(generation: Awaitable[Answer]) -> Answer:
    answer = await generation
    if answer.record.error is not None:
        raise RuntimeError(f"a request failed: {answer.record.error}")
    return answer


def _ttft_ms(answer: Answer) -> float:
    return 1e3 * (answer.record.event_times_s[0] - answer.record.sent_s)


def _logprob_difference(a: Answer, b: Answer) -> float:
    largest = 0.0
    for id_a, id_b, logprob_a, logprob_b in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs):
        if id_a != id_b:
            break
        largest = max(largest, abs(logprob_a - logprob_b))
    return largest


def _told(steps: Sequence[TimedStep]) -> dict[str, object]:
    """Of the steps by kind how many there were and what they took, and the longest ones."""
    kinds: dict[str, list[TimedStep]] = {"decode": [], "prompts": [], "both": []}
    for step in steps:
        num_prompts_at_least = step.num_tokens - step.num_rows
        has_decoding = step.num_tokens < _LEAST_PROMPT * step.num_rows
        kinds["decode" if not num_prompts_at_least else "both" if has_decoding else "prompts"].append(step)
    told: dict[str, object] = {
        kind: {
            "steps": len(found),
            "ms": round(1e3 * sum(step.seconds for step in found) / len(found), 2),
            "rows": round(sum(step.num_rows for step in found) / len(found), 1),
            "tokens": round(sum(step.num_tokens for step in found) / len(found), 1),
        }
        for kind, found in kinds.items()
        if found
    }
    longest = sorted(steps, key=lambda step: -step.seconds)[:_NUM_LONGEST]
    told["longest"] = [(round(1e3 * step.seconds, 1), step.num_rows, step.num_tokens) for step in longest]
    return told


def _difference(before: Sequence[Numbers], after: Sequence[Numbers], name: str) -> float:
    """By how much a metric grew, over these engines together."""
    return sum(new.get(name, 0.0) - old.get(name, 0.0) for old, new in zip(before, after))


if __name__ == "__main__":
    sys.exit(main())
