"""The quick start's cluster, as a client sees it: real HTTP, real model, prefill and decode in different processes."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.tools.trace.events import read_trace
from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(cluster: RunningCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered_by_two_processes_and_the_kv_moved(cluster: RunningCluster, client: openai.OpenAI) -> None:
    bytes_before = cluster.metric("atom_kv_transfer_bytes_total")
    # Nobody has asked this way before: of what decode has cached, nothing is moved.
    asked = [{"role": "system", "content": "You know all cities of the world."}, *QUESTION]
    answer = client.chat.completions.create(model=MODEL, messages=asked, temperature=0, max_tokens=20)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    assert cluster.pid_of("prefill") != cluster.pid_of("decode")
    cluster.wait_until(lambda: cluster.metric("atom_kv_transfer_bytes_total") > bytes_before)


def test_streaming_says_the_same_as_waiting(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text == whole.choices[0].message.content
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]


def test_completions_take_every_form_of_prompt(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5)
    many = client.completions.create(
        model=MODEL, prompt=["The capital of France is", "One plus one is"], temperature=0, max_tokens=5
    )
    assert many.choices[0].text == text.choices[0].text
    tokens = client.completions.create(model=MODEL, prompt=[504, 3575, 282, 4649, 314], temperature=0, max_tokens=5)
    assert tokens.usage is not None and tokens.usage.prompt_tokens == 5
    streamed = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == text.choices[0].text


def test_a_repeated_prompt_is_found_in_the_cache_and_answered_alike(client: openai.OpenAI) -> None:
    prompt = "Once upon a time there was a " + "very " * 60 + "old clock that"
    answers = [client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8) for _ in range(2)]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    details = answers[1].usage.prompt_tokens_details  # type: ignore[union-attr]
    assert details is not None and (details.cached_tokens or 0) >= 48


def test_a_seed_gives_the_same_sample_again_in_any_company(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="A short story:", temperature=1.0, seed=seed, max_tokens=12
        )
        return answer.choices[0].text

    alone = [sample(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sample, range(4)))
    assert together == alone
    assert len(set(alone)) > 1


def test_greedy_tokens_are_those_of_transformers(client: openai.OpenAI, demo_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_directory(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    randomness = random.Random(0)
    for _ in range(4):
        prompt = [randomness.randrange(100, 40_000) for _ in range(randomness.randrange(20, 80))]
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=2
            )[0, len(prompt) :].tolist()
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=24,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == tokenizer.decode(expected)


def test_a_profiler_window_covers_the_requests_of_both_roles(cluster: RunningCluster, client: openai.OpenAI) -> None:
    http = httpx.Client(base_url=cluster.url, timeout=300.0)
    refused = http.post("/stop_profile")
    assert refused.status_code == 409
    assert "no window is open" in refused.json()["error"]["message"]
    started = http.post("/start_profile", json={"roles": ["prefill", "decode"], "with_stack": False}).json()
    assert [entry["role"] for entry in started["replicas"]] == ["decode", "prefill"]
    assert http.post("/start_profile").status_code == 409
    client.completions.create(model=MODEL, prompt="Profile this, " * 10, temperature=0, max_tokens=4)
    phases: dict[str, set[str]] = {}
    for entry in http.post("/stop_profile").json()["replicas"]:
        (file,) = entry["files"]
        assert Path(file).name.startswith(f"{entry['replica']}_rank0_")
        phases[entry["role"]] = {step.kind for step in read_trace(Path(file)).steps}
    assert "prefill" in phases["prefill"] and "decode" in phases["decode"]
    assert http.post("/start_profile", json={"roles": ["decode"], "num_steps": 1}).status_code == 200
    assert http.post("/stop_profile", json={"replicas": ["nobody"]}).json()["error"]["param"] == "replicas"
    client.completions.create(model=MODEL, prompt="And this.", temperature=0, max_tokens=6)
    (entry,) = http.post("/stop_profile", json={"roles": ["decode"]}).json()["replicas"]
    assert len(read_trace(Path(entry["files"][0])).steps) == 1
    cluster.wait_until_idle()


def test_many_streams_some_cancelled_leave_nothing_behind(cluster: RunningCluster, client: openai.OpenAI) -> None:
    prefix = "You are a helpful assistant who answers briefly and politely. " * 4
    randomness = random.Random(1)
    plans = [(number, randomness.random() < 0.3, randomness.randrange(1, 8)) for number in range(64)]
    finished: list[int] = []
    lock = threading.Lock()

    def run(plan: tuple[int, bool, int]) -> None:
        number, is_cancelled, num_chunks = plan
        stream = client.completions.create(
            model=MODEL,
            prompt=f"{prefix} Question {number}: what is {number} plus {number}?",
            temperature=0,
            max_tokens=16,
            stream=True,
            extra_body={"ignore_eos": True},
            timeout=240,
        )
        with stream:
            for index, chunk in enumerate(stream):
                if is_cancelled and index >= num_chunks:
                    return
                if chunk.choices and chunk.choices[0].finish_reason == "length":
                    with lock:
                        finished.append(number)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(run, plans))
    expected = [number for number, is_cancelled, _ in plans if not is_cancelled]
    assert set(expected) <= set(finished)
    for ledger in cluster.wait_until_idle():
        assert set(ledger) >= {"free", "cached"}

    def hit_rate() -> float:
        queried = cluster.metric("atom_prefix_cache_queried_tokens_total")
        return cluster.metric("atom_prefix_cache_hit_tokens_total") / queried if queried else 0.0

    # Metrics reach the page some seconds late.
    cluster.wait_until(lambda: hit_rate() > 0.3)
