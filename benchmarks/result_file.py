"""A run as a JSON file with the fields of ATOM's `benchmark_serving`, so that results compare with published ones.

What ATOM's client has no field for is under `atom_cluster`: how to repeat the run, errors, goodput beside stalls, how
busy the client was, and what plots are made of.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atom_cluster.tools.facts import hardware, software
from benchmarks.client import RequestRecord
from benchmarks.load import Sent
from benchmarks.records import commit
from benchmarks.report import METRICS, Latency, Report, gaps_s
from benchmarks.serving_flags import pairs
from benchmarks.timeline import quantiles_ms, timeline

OWN = "atom_cluster"


def result_of(
    args: argparse.Namespace,
    arguments: Sequence[str],
    *,
    model: str,
    report: Report,
    sent: Sent,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole file. details: more of what is under `atom_cluster`; `accept_length` and `acceptance_rate` go above."""
    details = dict(details)
    accept_length, acceptance_rate = details.pop("accept_length", None), details.pop("acceptance_rate", None)
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "model_id": model,
        "tokenizer_id": args.tokenizer,
        "best_of": 1,
        "num_prompts": report.num_requests,
        **pairs(args.metadata, "--metadata"),
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **_rates(report),
        "accept_length": accept_length,
        "acceptance_rate": acceptance_rate,
    }
    for name in METRICS:
        if name in report.latencies:
            result |= _latency_fields(name, report.latencies[name])
    if args.save_detailed:
        result |= _detailed(sent.records)
    result[OWN] = _own(arguments, report, sent) | details
    return result


def _rates(report: Report) -> dict[str, Any]:
    goodput = None if report.goodput is None else report.goodput.requests_per_s
    num_prompt, num_output = report.num_prompt_tokens, report.num_output_tokens
    return {
        "duration": report.duration_s,
        "completed": report.num_succeeded,
        "total_input_tokens": num_prompt,
        "total_output_tokens": num_output,
        "request_throughput": report.per_s(report.num_succeeded),
        "request_goodput": goodput,
        # The published files have the colon in the name.
        "request_goodput:": goodput,
        "output_throughput": report.per_s(num_output),
        "total_token_throughput": report.per_s(num_prompt + num_output),
        "concurrency": report.concurrency,
    }


def _latency_fields(name: str, latency: Latency) -> dict[str, float]:
    fields = {f"mean_{name}_ms": latency.mean, f"median_{name}_ms": latency.median, f"std_{name}_ms": latency.std}
    return fields | {f"p{percent:g}_{name}_ms": value for percent, value in latency.percentiles.items()}


def _detailed(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """One entry per request, in the order of sending. Seconds."""
    return {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [gaps_s(record).tolist() for record in records],
        "generated_texts": [record.text or "" for record in records],
        "errors": [record.error or "" for record in records],
    }


def _own(arguments: Sequence[str], report: Report, sent: Sent) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.serving {shlex.join(without_secrets(arguments))}",
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(),
        "software": software(),
        "num_failed": report.num_failed,
        "errors": dict(report.errors),
        "error_samples": dict(report.error_samples),
        "total_cached_tokens": report.num_cached_tokens,
        "num_uncounted": report.num_uncounted,
        "tokens_per_event": report.tokens_per_event,
        "mean_token_ms": report.mean_token_ms,
        "goodput": None if report.goodput is None else asdict(report.goodput),
        "client": {**asdict(sent.client), "is_bottleneck": sent.client.is_bottleneck},
        "timeline": asdict(timeline(sent.records, begun_s=sent.begun_s, ended_s=sent.ended_s)),
        "quantiles_ms": quantiles_ms(sent.records),
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line, for keeping: keys and headers left out."""
    kept: list[str] = []
    is_hidden = False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0].replace("_", "-")
            is_hidden = name in ("--api-key", "--header")
            kept.append(f"{name}=..." if is_hidden else argument)
        elif not is_hidden:
            kept.append(argument)
    return kept


def file_name(args: argparse.Namespace, model: str, date: str) -> str:
    """The name that ATOM's client gives, unless one was asked for."""
    if args.result_filename:
        return str(args.result_filename)
    concurrency = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
    return f"{args.backend}-{args.request_rate}qps{concurrency}-{model.rsplit('/', 1)[-1]}-{date}.json"


def write(result: Mapping[str, Any], path: Path) -> Path:
    """Write the file, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Results of a file: one, of this client or of ATOM's, or a sweep's. Raises ValueError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    is_sweep = isinstance(document, dict) and isinstance(document.get("runs"), list)
    runs: list[Any] = document["runs"] if is_sweep else [document]
    if not all(isinstance(run, dict) and "output_throughput" in run for run in runs):
        raise ValueError(f"{path} is no result of a serving benchmark: it has no output_throughput")
    return runs
