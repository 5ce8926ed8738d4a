"""From the command line of `benchmarks.serving` to requests."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from benchmarks.datasets.arrivals import burst_arrivals, rate_arrivals
from benchmarks.datasets.files import custom_workload, hf_workload, sharegpt_workload
from benchmarks.datasets.request import LoadRequest, Workload
from benchmarks.datasets.synthetic import random_workload, sonnet_workload
from benchmarks.datasets.text import PromptText
from benchmarks.datasets.traces import trace_workload
from benchmarks.serving_flags import DEFAULT_NUM_PROMPTS, TRACES, lengths_of, trace_options_of

WARMUP_OUTPUT_LEN = 16
_WARMUP_SEED = 2**31


def build_workload(args: argparse.Namespace, text: PromptText | None, *, seed: int | None = None) -> Workload:
    """What the arguments ask for. Raises ValueError that names the flag."""
    seed = args.seed if seed is None else seed
    num_requests = args.num_prompts or DEFAULT_NUM_PROMPTS
    name = args.dataset_name
    if name in TRACES:
        options = trace_options_of(args)
        return trace_workload(name, args.dataset_path, options, vocab_size=args.vocab_size, seed=seed, text=text)
    if name == "custom":
        return custom_workload(
            args.dataset_path, num_requests=args.num_prompts, default_output_len=args.random_output_len
        )
    if name == "sharegpt":
        return sharegpt_workload(
            args.dataset_path, num_requests=num_requests, output_len=args.sharegpt_output_len, seed=seed, text=text
        )
    if name == "hf":
        return hf_workload(
            args.dataset_path,
            subset=args.hf_subset,
            split=args.hf_split,
            num_requests=num_requests,
            output_len=args.hf_output_len,
            seed=seed,
            text=text,
        )
    if name == "sonnet":
        return sonnet_workload(
            num_requests=num_requests,
            input_len=args.sonnet_input_len,
            output_len=args.sonnet_output_len,
            prefix_len=args.sonnet_prefix_len,
            seed=seed,
            text=text,
        )
    bursts = burst_arrivals(args.burst_size, args.burst_interval) if name == "burst" else None
    return random_workload(
        lengths_of(args),
        num_requests=num_requests,
        vocab_size=args.vocab_size,
        seed=seed,
        text=text,
        arrivals=bursts,
    )


def arrivals_of(args: argparse.Namespace, workload: Workload) -> Iterator[float] | None:
    """When requests are due; None: at their own times, or as soon as there is room.

    A rate replaces the times of a trace.
    """
    if not math.isinf(args.request_rate):
        return rate_arrivals(args.request_rate, burstiness=args.burstiness, seed=args.seed)
    if workload.has_times or args.max_concurrency is not None:
        return None
    return rate_arrivals(math.inf, burstiness=1.0, seed=args.seed)


def warmup_requests(args: argparse.Namespace, text: PromptText | None) -> list[LoadRequest]:
    """Like the others, with prompts of their own where they are made up, so that nothing measured is cached yet."""
    workload = build_workload(args, text, seed=_WARMUP_SEED + args.seed)
    return [
        replace(request, due_s=None, output_len=min(request.output_len, WARMUP_OUTPUT_LEN))
        for request in islice(workload.requests, args.num_warmups)
    ]
