"""The load tools against the project's own HTTP API, whose schemas refuse what they do not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path

import pytest

from atom_cluster.api.generator import GenerateInput
from atom_cluster.observability.memory import prometheus_text
from benchmarks import server_metrics
from benchmarks.serving import run
from benchmarks.serving_flags import parse_arguments
from tests.api.conftest import Api, Serve

TOKEN = (40,)


def endless(request: GenerateInput) -> Iterable[tuple[int, ...] | str]:
    """As many tokens as were asked for, then why it ends."""
    return [*repeat(TOKEN, request.sampling.max_tokens or 1), "length"]


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "openai-responses"])
async def test_the_api_takes_what_every_endpoint_is_asked(
    make_api: Callable[..., Api], serve: Serve, model_directory: Path, backend: str
) -> None:
    api = make_api(endless)
    text = [] if backend == "openai" else ["--tokenizer", str(model_directory)]
    flags = ["--backend", backend, "--num-prompts", "4", "--max-concurrency", "2", "--ignore-eos", "--disable-tqdm"]
    flags += ["--num-warmups", "0"]
    lengths = ["--random-input-len", "20", "--random-output-len", "6", "--vocab-size", "258"]
    args = parse_arguments(["--base-url", await serve(api.app), *flags, *lengths, *text])
    outcome = await run(args)
    assert outcome.report.errors == {}
    assert (outcome.report.num_succeeded, outcome.report.num_output_tokens) == (4, 24)
    assert set(outcome.report.latencies) == {"ttft", "tpot", "itl", "e2el"}
    assert api.generator.requests[-1].sampling.ignore_eos
    assert api.generator.requests[-1].sampling.temperature == 0
    page = server_metrics.parse(prometheus_text([({}, api.metrics)]))
    compared = server_metrics.compare(outcome.report, server_metrics.ServerMetrics(histograms={}), page, front_ms=0.0)
    observed = {one.metric: one.num_observed for one in compared}
    num_gaps = observed.pop(server_metrics.ITL)
    assert 0 < num_gaps <= 20  # writes may carry several tokens
    assert observed == {server_metrics.TTFT: 4, server_metrics.TPOT: 4, server_metrics.E2EL: 4}
