"""Latency and throughput of a running cluster, over HTTP.

Closed loop, 16 users who each wait for their answer:

    python -m benchmarks.serving --base-url http://127.0.0.1:8000 --concurrency 16 --num-requests 200

Open loop, 4 requests a second on average, whose prompts share one of 3 prefixes of 512 tokens:

    python -m benchmarks.serving --rate 4 --num-requests 200 --input-len 640 --prefix-len 512 --num-prefixes 3 --save

`--frontend-overhead` also reports the CPU time that the ingress processes spend per output token, from /proc, so they
must run on this host. Use it with the simulated deployment, whose engines cost next to nothing: 64 streams at 5,000
tokens a second in all are `--concurrency 64` against a step of 12.8 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import CompletionsClient, RequestRecord, closed_loop, open_loop
from benchmarks.report import Report, as_table, save, summarize
from benchmarks.workloads import Workload, make_prompts, poisson_arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run and what it ran on."""

    report: Report
    cluster: Any
    """Answer of /v1/cluster."""
    ingress_cpu_us_per_token: float | None
    """CPU microseconds of all ingress processes per output token, when asked for."""


def main(arguments: Sequence[str]) -> int:
    """Run, print, save if asked to. The exit status is 1 if any request failed."""
    args = parse_arguments(arguments)
    outcome = asyncio.run(run(args))
    print(as_table(outcome.report))
    if outcome.ingress_cpu_us_per_token is not None:
        print(f"ingress CPU         {outcome.ingress_cpu_us_per_token:.1f} us per output token")
    if args.save:
        details = {"ingress_cpu_us_per_token": outcome.ingress_cpu_us_per_token, "cluster": outcome.cluster}
        print(f"saved {save(outcome.report, arguments=arguments, details=details)}")
    return 1 if outcome.report.num_failed else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="name to ask for; the first one of /v1/models by default")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, default=8, help="closed loop: requests under way at any time")
    load.add_argument("--rate", type=float, help="open loop: requests per second, Poisson arrivals")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--num-warmup", type=int, default=4, help="requests beforehand that are not measured")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens")
    parser.add_argument("--prefix-len", type=int, default=0, help="prompt tokens shared with other prompts")
    parser.add_argument("--num-prefixes", type=int, default=1, help="different shared prefixes")
    parser.add_argument("--vocab-size", type=int, default=30_000, help="token ids are drawn below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="per request")
    parser.add_argument("--frontend-overhead", action="store_true", help="report CPU time of the ingress per token")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    return parser.parse_args(arguments)


async def run(args: argparse.Namespace) -> Outcome:
    """Warm up, then measure."""
    client = CompletionsClient(args.base_url, timeout_s=args.timeout_s)
    try:
        client.model = args.model or (await client.get_json("/v1/models"))["data"][0]["id"]
        await warm_up(client, args)
        cluster = await client.get_json("/v1/cluster")
        pids = ingress_pids(cluster) if args.frontend_overhead else []
        before_s = cpu_seconds(pids)
        report = summarize(await measure(client, args))
        used_s = cpu_seconds(pids) - before_s
    finally:
        await client.close()
    has_overhead = args.frontend_overhead and report.num_output_tokens > 0
    return Outcome(
        report=report,
        cluster=cluster,
        ingress_cpu_us_per_token=1e6 * used_s / report.num_output_tokens if has_overhead else None,
    )


async def warm_up(client: CompletionsClient, args: argparse.Namespace) -> None:
    """A few requests with prompts of their own, so that connections and kernels are there and no prefix is cached."""
    workload = Workload(
        num_requests=args.num_warmup, input_len=args.input_len, output_len=8, vocab_size=args.vocab_size, seed=-1
    )
    await closed_loop(client, make_prompts(workload), workload.output_len, concurrency=args.num_warmup)


async def measure(client: CompletionsClient, args: argparse.Namespace) -> list[RequestRecord]:
    """The run itself."""
    workload = Workload(
        num_requests=args.num_requests,
        input_len=args.input_len,
        output_len=args.output_len,
        prefix_len=args.prefix_len,
        num_prefixes=args.num_prefixes,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    prompts = make_prompts(workload)
    if args.rate is None:
        return await closed_loop(client, prompts, workload.output_len, args.concurrency)
    return await open_loop(client, prompts, workload.output_len, poisson_arrivals(args.rate, args.seed))


def ingress_pids(cluster: Mapping[str, Any]) -> list[int]:
    """Process ids of the ingresses in an answer of /v1/cluster."""
    return [ingress["pid"] for ingress in cluster["ingresses"]]


def cpu_seconds(pids: Sequence[int], proc: Path = Path("/proc")) -> float:
    """User and system time that these processes, threads included, have used so far."""
    ticks = 0
    for pid in pids:
        # The second field is the program's name in parentheses, which may contain anything; 14 and 15 are the times.
        fields = (proc / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
