"""Clients that ask the same questions over and over, and check each answer against the undisturbed one.

A client behaves as the OpenAI client does: what was refused (429, 5xx before the answer began, no connection) it sends
again after a while; a stream that breaks is an error of its own, after which the drill's client asks anew. A request is
lost when it has no right answer within its time, whatever was tried. Knows no faults.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from atom_cluster.tools.drill.cluster import DrillError, RunningCluster

REQUEST_TIMEOUT_S = 180.0
"""A request without its right answer by then is lost."""
_READ_TIMEOUT_S = 90.0
"""A connection that says nothing for so long is given up."""
_RETRY_S = 0.5
_NUM_QUESTIONS = 20


class RefusedError(Exception):
    """An answer that did not begin: a status to try again upon, or no connection."""


class BrokenAnswerError(Exception):
    """An answer that began and did not end as it should."""


@dataclass(slots=True)
class Outcome:
    """What became of all requests of a load."""

    num_sent: int = 0
    """Requests, however often each was sent."""
    num_right: int = 0
    num_refused: int = 0
    """Times that a request was refused and sent again."""
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Answers that began and broke; their requests were sent again."""
    lost: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    """Of any request until its right answer."""


class Load:
    """A number of clients, each with one request at a time."""

    def __init__(self, cluster: RunningCluster, *, num_clients: int, num_tokens: int = 16) -> None:
        """Asks every question once, undisturbed, for the answers to expect."""
        self._cluster = cluster
        self._num_clients = num_clients
        self._num_tokens = num_tokens
        self._model = str(cluster.get("/v1/models")["data"][0]["id"])
        self._lock = threading.Lock()
        self._expected = self._settled_answers()

    def run_while(self, disturb: Callable[[], None], outcome: Outcome) -> None:
        """Ask from all clients until each has an answer, `disturb()` returned, and as many answers came twice more.

        Counts into `outcome`. What `disturb` raises is raised when the clients have ended.
        """
        is_over = threading.Event()
        with ThreadPoolExecutor(self._num_clients) as pool:
            clients: list[Future[None]] = [
                pool.submit(self._be_client, number, outcome, is_over) for number in range(self._num_clients)
            ]
            try:
                self._wait_for(outcome, self._num_clients)
                disturb()
                self._wait_for(outcome, 2 * self._num_clients)
            finally:
                is_over.set()
            for client in clients:
                client.result()

    def _wait_for(self, outcome: Outcome, num_answers: int) -> None:
        goal = outcome.num_right + num_answers
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        while outcome.num_right < goal:
            if time.monotonic() > deadline_s:
                raise DrillError(f"fewer than {num_answers} right answers within {REQUEST_TIMEOUT_S:.0f} s: {outcome}")
            time.sleep(0.05)

    def _be_client(self, number: int, outcome: Outcome, is_over: threading.Event) -> None:
        turn = number
        while not is_over.is_set():
            self._ask_until_answered(turn % _NUM_QUESTIONS, outcome)
            turn += 1

    def _ask_until_answered(self, question: int, outcome: Outcome) -> None:
        began_s = time.monotonic()
        with self._lock:
            outcome.num_sent += 1
        problem = ""
        while time.monotonic() - began_s < REQUEST_TIMEOUT_S:
            try:
                text = self._ask(question)
            except RefusedError as exc:
                problem = str(exc)
                with self._lock:
                    outcome.num_refused += 1
                time.sleep(_RETRY_S)
                continue
            except BrokenAnswerError as exc:
                problem = str(exc)
                with self._lock:
                    outcome.broken.append(problem)
                time.sleep(_RETRY_S)
                continue
            with self._lock:
                outcome.longest_s = max(outcome.longest_s, time.monotonic() - began_s)
                if text == self._expected[question]:
                    outcome.num_right += 1
                else:
                    outcome.wrong.append(f"{text!r} instead of {self._expected[question]!r}")
            return
        with self._lock:
            outcome.lost.append(problem)

    def _settled_answers(self) -> list[str]:
        answers = [self._ask(question) for question in range(_NUM_QUESTIONS)]
        with ThreadPoolExecutor(_NUM_QUESTIONS) as pool:
            again = list(pool.map(self._ask, range(_NUM_QUESTIONS)))
        different = sum(before != after for before, after in zip(answers, again))
        if different:
            raise DrillError(
                f"{different} of {_NUM_QUESTIONS} greedy answers depend on what else runs, without any fault; use a "
                "float32 model for drills"
            )
        return answers

    def _ask(self, question: int) -> str:
        """The answer's text. Streams every other one."""
        body = {
            "model": self._model,
            "prompt": f"Write the numbers after {question}, one after the other, separated by commas: {question}," * 2,
            "temperature": 0,
            "max_tokens": self._num_tokens,
            "ignore_eos": True,
            "stream": question % 2 == 0,
        }
        address = urlsplit(self._cluster.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_READ_TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"} | self._cluster.headers
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise RefusedError(f"{type(exc).__name__}: {exc}") from exc
        try:
            if response.status != 200:
                text = response.read().decode(errors="replace")[:300]
                if response.status in (408, 409, 429) or response.status >= 500:
                    raise RefusedError(f"HTTP {response.status}: {text}")
                raise DrillError(f"HTTP {response.status}: {text}")
            return _streamed_text(response) if body["stream"] else _whole_text(response)
        except (OSError, http.client.HTTPException) as exc:
            raise BrokenAnswerError(f"{type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()


def _whole_text(response: http.client.HTTPResponse) -> str:
    data = response.read()
    try:
        (choice,) = json.loads(data)["choices"]
    except (ValueError, KeyError) as exc:
        raise BrokenAnswerError(f"no completion: {data[:200]!r}") from exc
    if choice["finish_reason"] != "length":
        raise BrokenAnswerError(f"finished with {choice['finish_reason']}")
    return str(choice["text"])


def _streamed_text(response: http.client.HTTPResponse) -> str:
    text, finish = "", None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            if finish != "length":
                raise BrokenAnswerError(f"the stream ended with {finish}")
            return text
        event = json.loads(line[6:])
        if "error" in event:
            raise BrokenAnswerError(f"error in the stream: {event['error']['message'][:200]}")
        for choice in event["choices"]:
            text += choice["text"]
            finish = choice["finish_reason"] or finish
    raise BrokenAnswerError("the stream ended without [DONE]")
