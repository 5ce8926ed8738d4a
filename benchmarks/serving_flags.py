"""The command line of `benchmarks.serving`: ATOM's `benchmark_serving` flags by their names and meanings, and ours.

Flags of ATOM's that mean nothing here are refused with the reason rather than taken without effect.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.datasets.synthetic import RandomLengths
from benchmarks.datasets.traces import TraceOptions
from benchmarks.endpoints import ChatEndpoint, CompletionsEndpoint, Endpoint, ResponsesEndpoint
from benchmarks.report import METRICS, Promises

BACKENDS: dict[str, type[CompletionsEndpoint] | type[ChatEndpoint] | type[ResponsesEndpoint]] = {
    "vllm": CompletionsEndpoint,
    "openai": CompletionsEndpoint,
    "sglang": CompletionsEndpoint,
    "openai-chat": ChatEndpoint,
    "openai-responses": ResponsesEndpoint,
}
_OTHER_PROTOCOLS = ("tgi", "lmdeploy", "deepspeed-mii", "tensorrt-llm", "scalellm")
DATASETS = ("random", "sonnet", "sharegpt", "hf", "custom", "azure", "mooncake", "burstgpt", "burst")
TRACES = ("azure", "mooncake", "burstgpt")
DEFAULT_NUM_PROMPTS = 1000

REFUSED = {
    "--best-of": "outputs are not ranked here: every request asks for one",
    "--use-beam-search": "this server samples; there is no beam search",
    "--lora-modules": "this server has no LoRA adapters",
    "--trust-remote-code": "a tokenizer is read from its files; no code of a checkpoint is run",
    "--tokenizer-mode": "there is one way to read a tokenizer: tokenizer.json",
}
"""Flags of ATOM's that are not taken, and why."""


class _Refuse(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is not supported: {REFUSED[flag]}")


def parse_arguments(arguments: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """Checked arguments; exits with a message that names the flag. Underscores in flags are hyphens too."""
    parser = make_parser(description)
    args = parser.parse_args([_hyphens(argument) for argument in arguments])
    try:
        check(args)
    except ValueError as exc:
        parser.error(str(exc))
    return args


def _hyphens(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser alone."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_datasets(parser.add_argument_group("dataset"))
    _add_results(parser.add_argument_group("results"))
    refused = parser.add_argument_group("refused")
    for flag, reason in REFUSED.items():
        refused.add_argument(flag, nargs="*", action=_Refuse, help=reason)
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=[*BACKENDS, *_OTHER_PROTOCOLS], default="vllm", help="which endpoint")
    group.add_argument("--base-url", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--endpoint", help="path, if not the backend's usual one")
    group.add_argument("--model", help="name to ask for; the first one of /v1/models by default")
    group.add_argument("--served-model-name", help="name to ask for, if --model is another one")
    group.add_argument("--tokenizer", help="directory, demo:NAME or hub id; prompts are text then, else ids")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    group.add_argument("--header", metavar="NAME=VALUE", nargs="+", default=[], help="sent with every request")
    group.add_argument("--timeout-s", type=float, default=600.0, help="per request")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-prompts", type=int, help=f"default {DEFAULT_NUM_PROMPTS}, or a trace's or file's all")
    group.add_argument("--request-rate", type=float, default=math.inf, help="requests per second; inf: all at once")
    group.add_argument("--burstiness", type=float, default=1.0, help="shape of the gamma distribution; 1: Poisson")
    group.add_argument("--max-concurrency", type=int, help="most requests under way; alone: a closed loop")
    group.add_argument("--speedup", type=float, default=1.0, help="a trace's times are divided by it")
    group.add_argument("--ignore-eos", action="store_true", help="exactly as many tokens as asked for")
    group.add_argument("--logprobs", type=int, help="alternatives per token to ask for")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--num-warmups", type=int, default=1, help="requests beforehand that are not measured")
    group.add_argument("--profile", action="store_true", help="have the server profile the run")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_datasets(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=DATASETS, default="random")
    group.add_argument("--dataset-path", type=Path, help="file or folder; traces: the shipped one by default")
    group.add_argument("--random-input-len", type=int, default=1024, help="tokens; also for burst")
    group.add_argument("--random-output-len", type=int, default=128, help="tokens; also for burst and custom")
    group.add_argument(
        "--random-range-ratio", type=float, default=1.0, help="shortest length as a share of the longest"
    )
    group.add_argument("--random-prefix-len", type=int, default=0, help="shared tokens in front of the others")
    group.add_argument("--num-prefixes", type=int, default=1, help="different shared prefixes")
    group.add_argument("--vocab-size", type=int, default=30_000, help="random ids are below; without --tokenizer")
    group.add_argument("--use-chat-template", action="store_true", help="put the model's template around prompts")
    group.add_argument("--sonnet-input-len", type=int, default=550)
    group.add_argument("--sonnet-output-len", type=int, default=150)
    group.add_argument("--sonnet-prefix-len", type=int, default=200)
    group.add_argument("--sharegpt-output-len", type=int, help="instead of the lengths of the file's answers")
    group.add_argument("--hf-subset", help="folder, or part of a file's name")
    group.add_argument("--hf-split", help="folder, or part of a file's name")
    group.add_argument("--hf-output-len", type=int, help="instead of the lengths of the file's answers")
    group.add_argument("--burst-size", type=int, default=16, help="requests at once")
    group.add_argument("--burst-interval", type=float, default=5.0, help="seconds from one burst to the next")
    group.add_argument("--trace-length-scale", type=float, default=1.0, help="a trace's lengths are multiplied by it")
    group.add_argument("--trace-max-total-len", type=int, help="leave out requests with more tokens")


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", help="which latencies to print")
    group.add_argument("--metric-percentiles", default="99", help="comma-separated")
    group.add_argument("--goodput", metavar="NAME:MS", nargs="+", default=[], help="promises: ttft, tpot, e2el")
    group.add_argument("--stall-ms", type=float, help="gap that counts as a stall; default 5 x tpot, or 1000")
    group.add_argument("--check-server-metrics", action="store_true", help="compare with the server's histograms")
    group.add_argument("--frontend-overhead", action="store_true", help="CPU time of ingresses on this host per token")
    group.add_argument("--save-result", action="store_true", help="write JSON")
    group.add_argument("--save-detailed", action="store_true", help="with values and texts of all requests")
    group.add_argument("--metadata", metavar="KEY=VALUE", nargs="*", default=[], help="kept in the JSON")
    group.add_argument("--result-dir", type=Path, default=Path(), help="default: here")
    group.add_argument("--result-filename")
    group.add_argument("--html", type=Path, help="write a page with plots")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names the flag."""
    if args.backend in _OTHER_PROTOCOLS:
        raise ValueError(f"--backend {args.backend} speaks another protocol; here all are OpenAI's: {list(BACKENDS)}")
    path = BACKENDS[args.backend].path
    if args.endpoint is not None and not args.endpoint.endswith(path.removeprefix("/v1")):
        raise ValueError(f"--endpoint {args.endpoint} is not what --backend {args.backend} asks, {path}")
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError("--num-prompts has to be at least 1")
    if args.num_warmups < 0:
        raise ValueError("--num-warmups has to be at least 0")
    if not args.timeout_s > 0:
        raise ValueError("--timeout-s has to be positive")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ValueError("--max-concurrency has to be at least 1")
    if not (args.request_rate > 0 and args.burstiness > 0):
        raise ValueError("--request-rate and --burstiness have to be positive")
    if args.speedup != 1.0 and args.dataset_name not in TRACES:
        raise ValueError("--speedup is for traces")
    pairs(args.metadata, "--metadata")
    pairs(args.header, "--header")
    promises_of(args)
    percentiles_of(args)
    metrics_of(args)
    lengths_of(args)
    trace_options_of(args)


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The endpoint to ask."""
    endpoint = BACKENDS[args.backend]()
    if args.endpoint is not None:
        endpoint.path = args.endpoint
    return endpoint


def base_url_of(args: argparse.Namespace) -> str:
    """Without a slash at the end."""
    return str(args.base_url or f"http://{args.host}:{args.port}").rstrip("/")


def headers_of(args: argparse.Namespace) -> dict[str, str]:
    """What is sent with every request."""
    key = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    return {**key, **pairs(args.header, "--header")}


def lengths_of(args: argparse.Namespace) -> RandomLengths:
    """Of random prompts."""
    return RandomLengths(
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        range_ratio=args.random_range_ratio,
        prefix_len=args.random_prefix_len,
        num_prefixes=args.num_prefixes,
    )


def trace_options_of(args: argparse.Namespace) -> TraceOptions:
    """How a trace is replayed."""
    return TraceOptions(
        num_requests=args.num_prompts,
        speedup=args.speedup,
        length_scale=args.trace_length_scale,
        max_total_len=args.trace_max_total_len,
    )


def promises_of(args: argparse.Namespace) -> Promises:
    """Of `--goodput ttft:2000 tpot:50`."""
    found: dict[str, float] = {}
    for item in args.goodput:
        name, colon, value = item.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not colon:
            raise ValueError(f"--goodput {item}: write ttft:MS, tpot:MS or e2el:MS")
        found[name] = _number("--goodput", value)
    return Promises(**found, stall=args.stall_ms)


def percentiles_of(args: argparse.Namespace) -> list[float]:
    """Of `--metric-percentiles 50,99`."""
    found = [_number("--metric-percentiles", value) for value in args.metric_percentiles.split(",")]
    if not all(0 <= percent <= 100 for percent in found):
        raise ValueError("--metric-percentiles have to be from 0 to 100")
    return found


def metrics_of(args: argparse.Namespace) -> list[str]:
    """Of `--percentile-metrics ttft,itl`."""
    names = [name.strip() for name in args.percentile_metrics.split(",")]
    if unknown := set(names) - set(METRICS):
        raise ValueError(f"--percentile-metrics: unknown {sorted(unknown)}; known are {list(METRICS)}")
    return names


def pairs(items: Sequence[str], flag: str) -> dict[str, str]:
    """Of `KEY=VALUE` items."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{flag} {item}: write KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def _number(flag: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{flag}: {value!r} is no number") from None
    if not number >= 0:
        raise ValueError(f"{flag}: {value} is negative")
    return number
