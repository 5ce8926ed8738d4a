"""A prefill gang of three ranks with small blocks beside a decode engine of one: answers are those of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from atom_cluster import LLMEngine, SamplingParams
from tests.e2e.cluster import REPO, RunningCluster, serve_run, with_args

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 24
PROMPTS = [
    f"Here is what I know about {topic}, in a few words that everybody understands: it is"
    for topic in ("the sea", "clocks that run backwards", "bread", "prime numbers", "the last train home", "rust")
]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    directory: Path = tmp_path_factory.mktemp("unequal")
    config = with_args(
        REPO / "configs" / "smollm2_cpu.yaml",
        directory / "cluster.yaml",
        prefill={"parallel": {"tensor": 3}, "block_size": 8},
        decode={"block_size": 16},
        cache={"num_blocks": 256},
        kv_transfer={"conditional_prefill": False},
    )
    with serve_run(config, directory) as running:
        yield running


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> list[tuple[str, list[float]]]:
    """Text, and log probabilities of its tokens."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    with LLMEngine(demo_model, dtype="float32", device="cpu", num_threads=1, num_blocks=256) as engine:
        outputs = engine.generate(PROMPTS, params)
    return [(output["text"], [entry.logprob for entry in output["logprobs"] or ()]) for output in outputs]


def ask(url: str, prompt: str) -> tuple[str, list[float]]:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "logprobs": 0,
    }
    answer = httpx.post(url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_answers_of_unequal_groups_are_those_of_one_engine(
    unequal: RunningCluster, expected: list[tuple[str, list[float]]]
) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: ask(unequal.url, prompt), PROMPTS))
    assert [text for text, _ in answers] == [text for text, _ in expected]
    for (_, logprobs), (_, wanted) in zip(answers, expected):
        assert len(logprobs) == NUM_TOKENS and logprobs == pytest.approx(wanted, abs=1e-3)
    replicas = {replica["role"]: replica for replica in unequal.replicas()}
    assert (replicas["prefill"]["block_size"], replicas["decode"]["block_size"]) == (8, 16)
    assert [replicas[role]["choices"]["collectives"] == "one rank" for role in ("prefill", "decode")] == [False, True]
    unequal.wait_until_idle()
    # Ray's agent shows what processes recorded some seconds later.
    unequal.wait_until(lambda: unequal.metric("atom_kv_transfer_bytes_total") > 0, what="KV was moved")
    assert unequal.metric("atom_kv_transfer_failures_total") == 0
