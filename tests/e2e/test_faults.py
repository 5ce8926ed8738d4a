"""Processes of the cluster are killed under load. Nobody hangs, no answer is wrong, and the cluster heals by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from atom_cluster.tools.drill.cluster import parent_of
from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
NUM_CLIENTS = 8


def prompt(number: int) -> str:
    return f"Write the numbers after {number}, one after the other, separated by commas: {number}," * 2


class Load:
    """Clients that ask the same questions over and over, and check every answer against the undisturbed one."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=120)
        self.expected = [self._ask(number) for number in range(NUM_CLIENTS)]
        self.num_right = 0
        self.wrong: list[str] = []
        self.errors: list[openai.OpenAIError] = []
        self._is_over = threading.Event()
        self._lock = threading.Lock()

    def _ask(self, number: int) -> str:
        text = ""
        with self._client.completions.create(
            model=MODEL,
            prompt=prompt(number),
            temperature=0,
            max_tokens=24,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            finish = None
            for chunk in stream:
                for choice in chunk.choices:
                    text += choice.text
                    finish = choice.finish_reason or finish
        if finish != "length":
            raise AssertionError(f"the stream ended with {finish} after {text!r}")
        return text

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            try:
                text = self._ask(number)
            except openai.OpenAIError as error:
                with self._lock:
                    self.errors.append(error)
                time.sleep(0.2)
                continue
            with self._lock:
                if text == self.expected[number]:
                    self.num_right += 1
                else:
                    self.wrong.append(f"{text!r} instead of {self.expected[number]!r}")

    def run_while(self, disturb: object) -> None:
        """Ask from all clients until `disturb()` has returned and every client has finished once more."""
        assert callable(disturb)
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients: list[Future[None]] = [pool.submit(self._run, number) for number in range(NUM_CLIENTS)]
            try:
                self._wait_for_answers(NUM_CLIENTS)
                disturb()
                self._wait_for_answers(2 * NUM_CLIENTS)
            finally:
                self._is_over.set()
            for client in clients:
                client.result()

    def _wait_for_answers(self, num_answers: int) -> None:
        goal = self.num_right + num_answers
        deadline_s = time.monotonic() + 120
        while self.num_right < goal:
            assert time.monotonic() < deadline_s, (
                f"{self.num_right} right, {len(self.errors)} failed: {self.errors[-3:]}"
            )
            time.sleep(0.1)


def kill_and_heal(cluster: RunningCluster, role: str) -> None:
    """SIGKILL rank 0 of a role, then wait until another process has the role and the cluster is ready."""
    victim = cluster.pid_of(role)
    os.kill(victim, signal.SIGKILL)
    cluster.wait_until(
        lambda: [r["pid"] != victim for r in cluster.replicas() if r["role"] == role] == [True], timeout_s=90
    )
    cluster.wait_until(cluster.is_ready, timeout_s=60)


def test_killing_prefill_loses_no_request(cluster: RunningCluster) -> None:
    load = Load(cluster)
    load.run_while(lambda: kill_and_heal(cluster, "prefill"))
    assert load.wrong == [] and load.errors == []
    cluster.wait_until_idle()


def test_killing_the_router_loses_no_request(cluster: RunningCluster) -> None:
    load = Load(cluster)

    def kill_router() -> None:
        before = cluster.get("/v1/cluster")["router"]["peer_id"]
        os.kill(serve_replica_pid(cluster, "Router"), signal.SIGKILL)
        cluster.wait_until(lambda: cluster.get("/v1/cluster")["router"]["peer_id"] != before, timeout_s=90)

    load.run_while(kill_router)
    assert load.wrong == [] and load.errors == []
    cluster.wait_until_idle()


def serve_replica_pid(cluster: RunningCluster, deployment: str) -> int:
    """The process of a deployment's only replica; Ray names its processes. There may be other clusters on this host."""
    name = f"ray::ServeReplica:atom:{deployment}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if (path / "cmdline").read_bytes().startswith(name):
                raylet = Path(f"/proc/{parent_of(path)}/cmdline").read_bytes()
                pids += [int(path.name)] if cluster.ray_address.encode() in raylet else []
    (pid,) = pids
    return pid


def test_killing_the_only_decode_replica_loses_no_request(cluster: RunningCluster) -> None:
    """Streams go on behind the tokens that they have, and new requests wait, until another replica is there."""
    load = Load(cluster)
    num_replayed = cluster.metric("atom_requests_replayed_total")
    load.run_while(lambda: kill_and_heal(cluster, "decode"))
    assert load.wrong == [] and load.errors == []
    cluster.wait_until(lambda: cluster.metric("atom_requests_replayed_total") > num_replayed)
    cluster.wait_until_idle()


def test_an_answer_with_everything_asked_of_it_is_the_same_when_decode_dies_in_the_middle(
    cluster: RunningCluster,
) -> None:
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def ask(after_chunk: Callable[[int], None]) -> tuple[str, list[float], str | None, tuple[int, int]]:
        text, logprobs, finish, usage = "", [], None, (0, 0)
        with client.completions.create(
            model=MODEL,
            prompt="A long story about a clock: once upon a time",
            temperature=0.9,
            top_p=0.95,
            seed=7,
            presence_penalty=0.5,
            frequency_penalty=0.4,
            max_tokens=120,
            logprobs=2,
            stop=["that never happens"],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "repetition_penalty": 1.1, "min_tokens": 100},
        ) as stream:
            for number, chunk in enumerate(stream):
                after_chunk(number)
                if chunk.usage is not None:
                    usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                for choice in chunk.choices:
                    text += choice.text
                    finish = choice.finish_reason or finish
                    if choice.logprobs is not None:
                        logprobs += [value for value in choice.logprobs.token_logprobs or () if value is not None]
        return text, logprobs, finish, usage

    def kill_after_some(number: int) -> None:
        if number == 20:
            os.kill(cluster.pid_of("decode"), signal.SIGKILL)

    undisturbed = ask(lambda number: None)
    disturbed = ask(kill_after_some)
    assert undisturbed[2:] == disturbed[2:] == ("length", (11, 120))
    assert disturbed[0] == undisturbed[0]
    assert len(disturbed[1]) == 120 and disturbed[1] == pytest.approx(undisturbed[1], abs=1e-3)
    cluster.wait_until(cluster.is_ready, timeout_s=60)
    cluster.wait_until_idle()
