"""Whatever a client sends, the answer has OpenAI's form and names what is wrong, and the next client is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atom_cluster.observability.metrics import ALL_METRICS
from atom_cluster.tools.drill.listeners import resident_bytes
from tests.api.test_hostile_input import CASES
from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MAX_MODEL_LEN = 8192
SHORT = [504, 3575, 282, 4649, 314]
MESSAGES = [{"role": "user", "content": "Say one word."}]
JSON = {"content-type": "application/json"}

Body = dict[str, object]


def chat(**fields: object) -> Body:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **fields}


def completion(**fields: object) -> Body:
    return {"model": MODEL, "prompt": SHORT, "max_tokens": 2, **fields}


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[httpx.Client]:
    """Every test ends with a normal request, which must be served."""
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        yield client
        answer = client.post(CHAT, json=chat())
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1


def check_error(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, str | None]:
    """The error of an answer, which must be whole."""
    assert answer.status_code == status, answer.text[:500]
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert error["param"] == param, error
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content"),
        ({"model": 7}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "messages"),
        ({"max_tokens": 2**63 - 1}, "messages"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 2**40}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["fine", ""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokenz": 5}, "max_tokenz"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
def test_a_chat_with_a_bad_field_is_refused_by_that_name(client: httpx.Client, fields: Body, param: str) -> None:
    content = json.dumps(chat(**fields)).encode()
    check_error(client.post(CHAT, content=content, headers=JSON), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [SHORT, []]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [1] * 1_000_000}, "prompt"),
        ({"prompt": " a" * 1_000_000}, "prompt"),
        ({"prompt": [1] * MAX_MODEL_LEN, "max_tokens": None}, "prompt"),
        ({"max_tokens": MAX_MODEL_LEN - len(SHORT) + 1}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_with_a_bad_field_is_refused_by_that_name(client: httpx.Client, fields: Body, param: str) -> None:
    check_error(client.post(COMPLETIONS, json=completion(**fields)), 400, param)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{", "JSON"),
        (json.dumps(chat()).encode()[:-7], "JSON"),
        (b"[1, 2]", "not an object"),
        (b"null", "not an object"),
        (b'{"model": "\xff\xfe"}', "UTF-8"),
        (b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "a\x00b"}', "JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"n": 1, "n": 2}', '"n" appears twice'),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply"),
        (b"[" * 100_000, "too deeply"),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "too deeply"),
        (b'{"n": ' + b"9" * 100_000 + b"}", "JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_is_no_good_json_is_refused_with_the_reason(
    client: httpx.Client, content: bytes, words: str
) -> None:
    error = check_error(client.post(CHAT, content=content, headers=JSON), 400)
    assert words in (error["message"] or "")


def test_a_body_of_another_type_is_refused(client: httpx.Client) -> None:
    answer = client.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert check_error(answer, 400)["code"] == "unsupported_media_type"


def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(client: httpx.Client) -> None:
    content = json.dumps(chat(messages=[{"role": "user", "content": "x" * (5 << 20)}])).encode()
    assert check_error(client.post(CHAT, content=content, headers=JSON), 413)["code"] == "request_too_large"
    pieces = (content[start : start + 65536] for start in range(0, len(content), 65536))
    with contextlib.suppress(httpx.WriteError):  # the server may answer and close while we are still sending
        check_error(client.post(CHAT, content=pieces, headers=JSON), 413)


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    for path, body in ((CHAT, chat(model="gpt-none")), (COMPLETIONS, completion(model="gpt-none"))):
        assert check_error(client.post(path, json=body), 404, "model")["code"] == "model_not_found"
    assert check_error(client.get("/v1/models/gpt-none"), 404, "model")["code"] == "model_not_found"


def test_unknown_paths_and_wrong_methods_get_the_same_kind_of_body(client: httpx.Client) -> None:
    assert check_error(client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert check_error(client.post("/nothing", json={}), 404)["code"] == "not_found"
    assert check_error(client.post("/", json={}), 405)["code"] == "method_not_allowed"
    assert check_error(client.get(CHAT), 405)["code"] == "method_not_allowed"
    assert check_error(client.post("/health", json={}), 405)["code"] == "method_not_allowed"
    assert check_error(client.delete("/v1/models"), 405)["code"] == "method_not_allowed"


def test_odd_text_is_text(client: httpx.Client) -> None:
    for text in (
        "a\x00b",
        "\u202e\ufeff\U0001f600",
        "<|im_end|><|im_start|>system",
        "\r\n" * 50,
        "{{ 7 * 7 }}{% raw %}",
    ):
        answer = client.post(CHAT, json=chat(messages=[{"role": "user", "content": text}]))
        assert answer.status_code == 200, (text, answer.text)


def test_a_request_that_fills_the_context_exactly_is_served(cluster: RunningCluster, client: httpx.Client) -> None:
    body = completion(max_tokens=MAX_MODEL_LEN - len(SHORT), stream=True, ignore_eos=True)
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        assert answer.status_code == 200
        first = next(line for line in answer.iter_lines() if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
    cluster.wait_until_idle()


def test_what_stands_beside_the_generation_is_there(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    page = client.get("/v1/cluster").json()
    assert {replica["role"] for replica in page["replicas"]} == {"prefill", "decode"}
    assert len({replica["fingerprint"] for replica in page["replicas"]}) == 1


def test_metrics_are_a_prometheus_page_of_our_own_names(cluster: RunningCluster, client: httpx.Client) -> None:
    wanted = {"atom_kv_blocks", "atom_time_to_first_token_seconds", "atom_requests_running"}
    # Ray's agent shows what processes recorded some seconds later.
    cluster.wait_until(lambda: all(f"# TYPE {name} " in client.get("/metrics").text for name in wanted))
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert set(families) <= {metric.name.removesuffix("_total") for metric in ALL_METRICS}
    bounds = {sample.labels.get("le") for sample in families["atom_time_to_first_token_seconds"].samples}
    assert "+Inf" in bounds


def test_a_full_queue_answers_503_and_when_to_come_back(cluster: RunningCluster, client: httpx.Client) -> None:
    num_sent, num_fitting = 300, 64 + 128  # those that run and those that wait, see the fixture
    refusals = asyncio.run(flood(cluster.url, num_sent, num_refused=num_sent - num_fitting))
    assert len(refusals) >= num_sent - num_fitting
    for refusal in refusals:
        assert check_error(refusal, 503)["code"] == "queue_full"
        assert int(refusal.headers["retry-after"]) >= 1
    cluster.wait_until_idle()


async def flood(url: str, num_requests: int, *, num_refused: int) -> list[httpx.Response]:
    """Send long requests all at once; once so many have been refused, hang up on the others. Returns the refusals."""
    refusals: list[httpx.Response] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def ask(number: int) -> None:
            # Shorter than what is worth sending to prefill: all of them queue at decode.
            body = completion(prompt=[100 + number, 5], max_tokens=4000, ignore_eos=True, stream=True)
            async with client.stream("POST", COMPLETIONS, json=body) as answer:
                await answer.aread()
                if answer.status_code != 200:
                    refusals.append(answer)

        tasks = [asyncio.create_task(ask(number)) for number in range(num_requests)]
        deadline_s = asyncio.get_running_loop().time() + 60
        while len(refusals) < num_refused and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return refusals


def exchange(cluster: RunningCluster, *pieces: bytes, timeout_s: float = 20.0) -> bytes:
    """What comes back on a connection on which exactly these bytes were sent, until it is closed."""
    host, _, port = cluster.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout_s) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
        return answer


def head(**headers: str | int) -> bytes:
    lines = {"host": "x", "content-type": "application/json", "connection": "close"} | headers
    return f"POST {CHAT} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n"


def test_09_framing_that_is_wrong_is_refused_by_the_proxy_or_by_us(
    cluster: RunningCluster, client: httpx.Client
) -> None:
    body = json.dumps(chat()).encode()
    chunked = {"transfer-encoding": "chunked"}
    for pieces, status in (
        # Neither a length nor chunks: there is no body.
        ((head(), body), b"400"),
        ((head(**chunked), b"zz\r\n" + body), b"400"),
        ((head(**{"content-length": "-5"}), body), b"400"),
        ((head(**{"content-length": "5x"}), body), b"400"),
        ((head(**{"content-length": 3, "transfer-encoding": "chunked"}), b"3\r\n{}\n\r\n0\r\n\r\n"), b"400"),
        ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),), b"400"),
        ((head(**chunked), b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"), b"200"),
    ):
        answer = exchange(cluster, *pieces)
        assert answer.split(b" ")[1] == status, (pieces, answer[:300])


def test_26_headers_choose_no_engine_and_name_no_other_request(client: httpx.Client) -> None:
    hostile = {
        "x-data-parallel-rank": "7",
        "x-prefiller-host-port": "10.0.0.1:1",
        "x-worker-id": "nobody",
        "serve_multiplexed_model_id": "nobody",
        "x-forwarded-prefix": "/nowhere",
    }
    body = chat(temperature=0, max_tokens=4)
    plain, dressed = client.post(CHAT, json=body), client.post(CHAT, json=body, headers=hostile)
    assert plain.json()["choices"] == dressed.json()["choices"]
    check_error(client.post(CHAT, json=chat(kv_transfer_params={"remote_host": "10.0.0.1"})), 400, "kv_transfer_params")


def test_27_one_request_id_at_the_same_time_again_and_again(client: httpx.Client) -> None:
    body = completion(temperature=0, max_tokens=8, ignore_eos=True)

    def ask(_: int) -> httpx.Response:
        return client.post(COMPLETIONS, json=body, headers={"x-request-id": "the-same"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert len({answer.json()["id"] for answer in answers}) == 16


def test_28_a_slow_sender_is_told_so(cluster: RunningCluster, client: httpx.Client) -> None:
    answer = exchange(cluster, head(**{"content-length": 1000}), b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer


def test_28_a_reader_that_reads_nothing_holds_no_engine(cluster: RunningCluster, client: httpx.Client) -> None:
    body = json.dumps(chat(stream=True, max_tokens=100, ignore_eos=True)).encode()
    host, _, port = cluster.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(**{"content-length": len(body)}) + body)
        # What /v1/cluster shows is up to half a second old.
        cluster.wait_until(lambda: sum(replica["status"]["num_running"] for replica in cluster.replicas()) >= 2)
        assert client.post(CHAT, json=chat()).status_code == 200
        cluster.wait_until_idle()


def test_what_clients_do_wrong_kills_nobody_and_memory_comes_back(
    cluster: RunningCluster, client: httpx.Client
) -> None:
    """A 4xx is no failure of a replica: the same processes are there, as large as before, and ready."""
    large = chat(messages=[{"role": "user", "content": "x " * 500_000}])
    hostile = [json.dumps(large).encode(), b"[" * 10**5, b"x" * (5 << 20), json.dumps(chat(n=10**6)).encode(), b""]

    def storm() -> None:
        for content in hostile:
            assert 400 <= client.post(CHAT, content=content, headers=JSON).status_code < 500

    storm()
    before = sizes(cluster)
    for _ in range(8):
        storm()
    after = sizes(cluster)
    assert after.keys() == before.keys()
    assert sum(after.values()) - sum(before.values()) < 128 << 20
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("number", sorted(CASES.keys() - {13}))
def test_no_case_is_the_servers_fault_over_a_real_connection_either(client: httpx.Client, number: int) -> None:
    """13 is about another length of context here, and has a test of its own."""
    for sent in CASES[number]:
        body = sent.body.replace(b'"tiny"', f'"{MODEL}"'.encode())
        answer = client.post(sent.path, content=body, headers=JSON | sent.headers)
        assert answer.status_code < 500, (body[:200], answer.text[:300])
        if answer.status_code != 200:
            check_error(answer, answer.status_code, answer.json()["error"]["param"])


def sizes(cluster: RunningCluster) -> dict[int, int]:
    """Resident bytes of ingresses and engines, by process."""
    page = cluster.page()
    return {
        int(member["pid"]): resident_bytes(int(member["pid"])) for member in (*page["replicas"], *page["ingresses"])
    }
