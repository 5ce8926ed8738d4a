"""Latency and throughput of a running server, over HTTP, in the terms of ATOM's `benchmark_serving`.

Closed loop, 16 users who each wait for their answer:

    python -m benchmarks.serving --max-concurrency 16 --num-prompts 200 --random-input-len 1024 --ignore-eos

Open loop, 4 requests a second on average, whose prompts share one of 3 prefixes of 512 tokens, and what was promised:

    python -m benchmarks.serving --request-rate 4 --random-prefix-len 512 --num-prefixes 3 --goodput ttft:2000 tpot:50

An hour of a real service in six minutes, with a page of plots:

    python -m benchmarks.serving --dataset-name azure --speedup 10 --ignore-eos --save-result --html azure.html

docs/benchmarking.md has every flag and how each number is defined. The exit status is 1 if a request failed, 2 for
wrong arguments, and 3 if `--check-server-metrics` found the server's own figures to be others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks import server_metrics
from benchmarks.client import ApiClient, RequestRecord
from benchmarks.datasets.request import LoadRequest
from benchmarks.datasets.text import PromptText
from benchmarks.endpoints import Asking, Endpoint
from benchmarks.html_report import write_page
from benchmarks.load import LAG_LIMIT_MS, ClientLoad, Sent, file_limit, orders_of, send_all
from benchmarks.report import Report, as_table, summarize
from benchmarks.result_file import OWN, file_name, result_of, write
from benchmarks.server_metrics import Agreement, Front, ServerMetrics
from benchmarks.serving_flags import (
    base_url_of,
    endpoint_of,
    headers_of,
    metrics_of,
    parse_arguments,
    percentiles_of,
    promises_of,
)
from benchmarks.workload import arrivals_of, build_workload, warmup_requests

_PROFILE_PATHS = ("/start_profile", "/stop_profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run and what it ran on."""

    model: str
    report: Report
    sent: Sent
    cluster: Any = None
    """Answer of /v1/cluster; None from other servers."""
    agreements: list[Agreement] = field(default_factory=list)
    accept_length: float | None = None
    acceptance_rate: float | None = None
    ingress_cpu_us_per_token: float | None = None
    """CPU microseconds of all ingress processes per output token, when asked for."""

    @property
    def differs(self) -> bool:
        """Whether the server's own figures are others."""
        return any(not one.is_close for one in self.agreements)

    def details(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "accept_length": self.accept_length,
            "acceptance_rate": self.acceptance_rate,
            "server_metrics": [_told(one) for one in self.agreements],
            "ingress_cpu_us_per_token": self.ingress_cpu_us_per_token,
            "cluster": self.cluster,
        }


def _told(one: Agreement) -> dict[str, Any]:
    return {**asdict(one), "difference_ms": one.difference_ms, "is_close": one.is_close}


def main(arguments: Sequence[str]) -> int:
    """Run, print, save if asked to."""
    args = parse_arguments(arguments, __doc__)
    try:
        outcome, result = measure(args, arguments)
    except (ValueError, aiohttp.ClientError, TimeoutError) as exc:
        print(f"benchmarks.serving: {exc}", file=sys.stderr)
        return 2
    tell(args, outcome)
    if args.save_result:
        path = args.result_dir / file_name(args, outcome.model, result["date"])
        print(f"saved {write(result, path)}")
    if args.html:
        print(f"saved {write_page([result], args.html)}")
    return status_of([result])


def tell(args: argparse.Namespace, outcome: Outcome) -> None:
    """Print what was found."""
    print(as_table(outcome.report, metrics_of(args)))
    print(_about_client(outcome.sent.client))
    if outcome.accept_length is not None:
        print(f"speculation         {outcome.accept_length:.2f} tokens a step, {outcome.acceptance_rate:.1%} kept")
    if outcome.ingress_cpu_us_per_token is not None:
        print(f"ingress CPU         {outcome.ingress_cpu_us_per_token:.1f} us per output token")
    if outcome.agreements:
        print(server_metrics.as_table(outcome.agreements))
        if outcome.differs and outcome.sent.client.is_bottleneck:
            print("The client did not keep up: a difference may be its own. Repeat this on a host with less to do.")


def status_of(results: Sequence[Mapping[str, Any]]) -> int:
    """Of a process that made these runs: 1 if a request failed, 3 if the server's own figures were others, else 0."""
    if any(result[OWN]["num_failed"] for result in results):
        return 1
    return 3 if any(not one["is_close"] for result in results for one in result[OWN]["server_metrics"]) else 0


def measure(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[Outcome, dict[str, Any]]:
    """One run and its result file's content. Raises ValueError for impossible arguments, ClientError without a
    server."""
    gc.collect()
    # What is there by now stays: collections while requests are under way would look through it for nothing.
    gc.freeze()
    outcome = asyncio.run(run(args))
    result = result_of(
        args, arguments, model=outcome.model, report=outcome.report, sent=outcome.sent, details=outcome.details()
    )
    return outcome, result


async def run(args: argparse.Namespace) -> Outcome:
    """Warm up, then measure."""
    text = None
    if args.tokenizer is not None:
        text = PromptText.load(args.tokenizer, use_chat_template=args.use_chat_template)
    elif args.use_chat_template:
        raise ValueError("--use-chat-template needs a --tokenizer")
    endpoint = endpoint_of(args)
    client = ApiClient(
        base_url_of(args),
        endpoint,
        timeout_s=args.timeout_s,
        headers=headers_of(args),
        max_connections=file_limit(),
        keep_text=args.save_detailed,
    )
    try:
        return await _run(args, client, endpoint, text)
    finally:
        await client.close()


async def _run(args: argparse.Namespace, client: ApiClient, endpoint: Endpoint, text: PromptText | None) -> Outcome:
    model = args.served_model_name or args.model or (await client.get_json("/v1/models"))["data"][0]["id"]
    asking = Asking(model=model, ignore_eos=args.ignore_eos, logprobs=args.logprobs, temperature=args.temperature)

    def encode(request: LoadRequest) -> bytes:
        return endpoint.body(request, asking)

    await warm_up(client, [encode(request) for request in warmup_requests(args, text)])
    cluster = await _cluster(client)
    pids = ingress_pids(cluster) if args.frontend_overhead else []
    before, before_s = await _server_metrics(args, client), cpu_seconds(pids)
    front = Front(lambda: client.get_text("/health"))
    async with _profiled(args, client), front if args.check_server_metrics else contextlib.nullcontext():
        sent = await _send(args, client, encode, text)
    used_s = cpu_seconds(pids) - before_s
    after = await _server_metrics(args, client)
    report = summarize(
        sent.records,
        duration_s=max(1e-9, sent.ended_s - sent.begun_s),
        percentiles=percentiles_of(args),
        promises=promises_of(args),
    )
    accept_length, acceptance_rate = (None, None)
    if before is not None and after is not None:
        accept_length, acceptance_rate = server_metrics.speculation(before, after)
    has_overhead = args.frontend_overhead and report.num_output_tokens > 0
    return Outcome(
        model=model,
        report=report,
        sent=sent,
        cluster=cluster,
        agreements=_agreements(args, report, before, after, front_ms=front.mean_ms),
        accept_length=accept_length,
        acceptance_rate=acceptance_rate,
        ingress_cpu_us_per_token=1e6 * used_s / report.num_output_tokens if has_overhead else None,
    )


async def warm_up(client: ApiClient, bodies: Sequence[bytes]) -> None:
    """Requests beforehand, all at once, so that connections and kernels are there. Raises ValueError if one fails."""
    for record in await asyncio.gather(*(client.send(body) for body in bodies)):
        if record.error is not None:
            raise ValueError(f"a warm-up request failed: {record.error}")


async def _send(args: argparse.Namespace, client: ApiClient, encode: Any, text: PromptText | None) -> Sent:
    workload = build_workload(args, text)
    limit = min(args.max_concurrency or file_limit(), file_limit())
    orders = orders_of(workload.requests, encode, arrivals_of(args, workload))
    with tqdm(total=workload.num_requests, disable=args.disable_tqdm, unit="req", mininterval=0.5) as bar:
        num_failed = 0

        def on_end(record: RequestRecord) -> None:
            nonlocal num_failed
            if record.error is not None:
                num_failed += 1
                bar.set_postfix(failed=num_failed, refresh=False)
            bar.update()

        sent = await send_all(orders, client.send, max_under_way=limit, on_end=on_end)
    for record in sent.records:
        if not args.ignore_eos:
            record.num_wanted_tokens = None
    return sent


@contextlib.asynccontextmanager
async def _profiled(args: argparse.Namespace, client: ApiClient) -> Any:
    if not args.profile:
        yield
        return
    print(f"profile started: {await client.post(_PROFILE_PATHS[0], {})}")
    try:
        yield
    finally:
        print(f"profile: {await client.post(_PROFILE_PATHS[1], {})}")


async def _cluster(client: ApiClient) -> Any:
    with contextlib.suppress(aiohttp.ClientError):
        return await client.get_json("/v1/cluster")
    return None


async def _server_metrics(args: argparse.Namespace, client: ApiClient) -> ServerMetrics | None:
    if args.check_server_metrics:
        return await server_metrics.settled(lambda: client.get_text("/metrics"))
    with contextlib.suppress(aiohttp.ClientError, ValueError):
        return server_metrics.parse(await client.get_text("/metrics"))
    return None


def _agreements(
    args: argparse.Namespace,
    report: Report,
    before: ServerMetrics | None,
    after: ServerMetrics | None,
    *,
    front_ms: float,
) -> list[Agreement]:
    if not args.check_server_metrics or before is None or after is None:
        return []
    found = server_metrics.compare(report, before, after, front_ms=front_ms)
    if not found:
        raise ValueError("--check-server-metrics: the server's /metrics has none of our histograms")
    return found


def _about_client(client: ClientLoad) -> str:
    line = (
        f"client              timers late by {client.event_loop_lag_ms_mean:.2f} ms on average, "
        f"{client.event_loop_lag_ms_p99:.2f} at p99; CPU {client.cpu_share:.0%} of a core; "
        f"at most {client.max_under_way} under way; sent {client.late_ms_p99:.1f} ms late at p99"
    )
    if client.is_bottleneck:
        line += (
            f"\nWARNING: this client did not keep up (timers more than {LAG_LIMIT_MS:.0f} ms late, or a core used "
            "up): latencies are partly its own. Run fewer requests per client, or on another machine."
        )
    return line


def ingress_pids(cluster: Mapping[str, Any] | None) -> list[int]:
    """Process ids of the ingresses in an answer of /v1/cluster. Raises ValueError when there was none."""
    if cluster is None:
        raise ValueError("--frontend-overhead: the server has no /v1/cluster")
    return [ingress["pid"] for ingress in cluster["ingresses"]]


def cpu_seconds(pids: Sequence[int], proc: Path = Path("/proc")) -> float:
    """User and system time that these processes, threads included, have used so far.

    Raises ValueError for one that is not on this host.
    """
    ticks = 0
    for pid in pids:
        try:
            stat = (proc / str(pid) / "stat").read_text(encoding="utf-8")
        except OSError as exc:
            raise ValueError(f"--frontend-overhead: no ingress on this host has the process id {pid}") from exc
        # The second field is the program's name in parentheses, which may contain anything; 14 and 15 are the times.
        fields = stat.rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
