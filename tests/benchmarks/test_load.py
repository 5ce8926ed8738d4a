"""Client and load against a small server: loops, failures, limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from benchmarks.client import ApiClient, RequestRecord, _note
from benchmarks.datasets.request import LoadRequest
from benchmarks.endpoints import Asking, ChatEndpoint, CompletionsEndpoint, Endpoint, Piece, ResponsesEndpoint
from benchmarks.load import ClientLoad, Order, file_limit, orders_of, send_all
from tests.benchmarks.fake_server import FakeServer, running

REQUEST = LoadRequest(prompt="hello", output_len=7)
ASKING = Asking(model="tiny", ignore_eos=True)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with running() as fake:
        yield fake


async def ask(server: FakeServer, endpoint: Endpoint, asking: Asking = ASKING) -> RequestRecord:
    client = ApiClient(server.url + "/", endpoint, timeout_s=5.0, keep_text=True)
    try:
        return await client.send(endpoint.body(REQUEST, asking))
    finally:
        await client.close()


@pytest.mark.parametrize("endpoint", [CompletionsEndpoint(), ChatEndpoint(), ResponsesEndpoint()])
async def test_every_endpoint_gives_the_same_record(server: FakeServer, endpoint: Endpoint) -> None:
    record = await ask(server, endpoint)
    assert record.error is None
    assert (record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens) == (5, 7, 2)
    first_s, last_s = record.event_times_s
    assert record.sent_s < first_s < last_s <= record.ended_s
    assert record.text in ("ab", "b")  # the chat server reasons first, which is no text but output
    assert server.bodies[0]["model"] == "tiny"
    assert server.bodies[0]["ignore_eos"] is True


async def test_log_probabilities_are_asked_for_in_each_endpoints_words(server: FakeServer) -> None:
    asking = Asking(model="tiny", logprobs=3, temperature=None, extra={"priority": 2})
    await ask(server, CompletionsEndpoint(), asking)
    await ask(server, ChatEndpoint(), asking)
    text, chat = server.bodies
    assert (text["logprobs"], chat["logprobs"], chat["top_logprobs"]) == (3, True, 3)
    assert text["priority"] == 2
    assert "temperature" not in text
    with pytest.raises(ValueError, match="logprobs"):
        ResponsesEndpoint().body(REQUEST, asking)


def test_prompts_that_an_endpoint_cannot_take_are_refused() -> None:
    ids = LoadRequest(prompt=[1, 2], output_len=1)
    with pytest.raises(ValueError, match="--tokenizer"):
        ChatEndpoint().body(ids, ASKING)
    with pytest.raises(ValueError, match="openai-chat"):
        CompletionsEndpoint().body(LoadRequest(messages=[{"role": "user", "content": "a"}], output_len=1), ASKING)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("refused", "HTTP 503", "full"),
        ("broken", "error in stream", "engine lost"),
        ("cut", "the stream ended early", "last event"),
    ],
)
async def test_failures_are_recorded(server: FakeServer, failure: str, kind: str, message: str) -> None:
    server.failure = failure
    record = await ask(server, CompletionsEndpoint())
    assert record.error is not None
    assert message in record.error
    assert record.error_kind == kind


async def test_a_server_that_is_not_there_or_does_not_answer_is_a_failure_too(server: FakeServer) -> None:
    nobody = ApiClient("http://127.0.0.1:9", CompletionsEndpoint(), timeout_s=5.0)
    gone = await nobody.send(b"{}")
    await nobody.close()
    assert gone.error_kind == "ClientConnectorError"
    server.gap_s = 0.4
    hasty = ApiClient(server.url, CompletionsEndpoint(), timeout_s=0.05)
    late = await hasty.send(CompletionsEndpoint().body(REQUEST, ASKING))
    await hasty.close()
    assert late.error is not None
    assert late.error_kind in ("TimeoutError", "SocketTimeoutError")


def test_a_token_without_text_is_seen_by_the_reason_it_ends_with() -> None:
    end = CompletionsEndpoint().piece(b'{"choices": [{"text": "", "finish_reason": "stop"}]}')
    assert (end.has_output, end.is_finish) == (False, True)
    role = ChatEndpoint().piece(b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
    assert (role.has_output, role.is_finish) == (False, False)
    tool = ChatEndpoint().piece(b'{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}')
    scored = CompletionsEndpoint().piece(b'{"choices": [{"text": "", "logprobs": {"tokens": ["a"]}}]}')
    assert tool.has_output
    assert scored.has_output


def test_an_end_without_text_is_an_arrival_unless_it_came_with_text() -> None:
    record = RequestRecord(sent_s=0.0)
    for piece, now_s in [(Piece(has_output=True), 1.0), (Piece(is_finish=True), 1.0), (Piece(is_finish=True), 2.0)]:
        _note(record, piece, now_s)
    assert list(record.event_times_s) == [1.0, 2.0]


def test_the_responses_endpoint_ends_with_its_last_event() -> None:
    endpoint = ResponsesEndpoint()
    assert endpoint.piece(b'{"type": "response.failed"}').error == "response.failed"
    assert endpoint.piece(b'{"type": "error", "message": "no"}').error == "no"
    assert endpoint.piece(b'{"type": "response.incomplete", "response": {}}').is_last
    assert not endpoint.piece(b'{"type": "response.created"}').is_last


class Slow:
    """Answers after a while; counts how many wait."""

    def __init__(self, answer_s: float = 0.02) -> None:
        self.answer_s = answer_s
        self.under_way = self.most = 0
        self.bodies: list[bytes] = []

    async def send(self, body: bytes) -> RequestRecord:
        self.bodies.append(body)
        record = RequestRecord(sent_s=time.monotonic())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.answer_s)
        self.under_way -= 1
        record.ended_s = time.monotonic()
        return record


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    slow = Slow()
    ended: list[RequestRecord] = []
    orders = (Order(str(index).encode(), None, 5) for index in range(12))
    sent = await send_all(orders, slow.send, max_under_way=3, on_end=ended.append)
    assert slow.most == sent.client.max_under_way == 3
    assert slow.bodies == [str(index).encode() for index in range(12)]
    assert len(sent.records) == len(ended) == 12
    assert {record.num_wanted_tokens for record in sent.records} == {5}
    assert all(record.error is None and record.due_s is None for record in sent.records)


async def test_an_open_loop_does_not_wait_for_answers_and_keeps_to_the_times() -> None:
    slow = Slow(answer_s=0.3)
    orders = (Order(b"", index * 0.02, 1) for index in range(10))
    sent = await send_all(orders, slow.send, max_under_way=100)
    assert slow.most == 10
    due_s = [record.due_s for record in sent.records if record.due_s is not None]
    assert [later - due_s[0] for later in due_s] == pytest.approx([index * 0.02 for index in range(10)])
    assert all(record.sent_s >= at_s for record, at_s in zip(sent.records, due_s))


async def test_requests_that_wait_for_a_slot_are_told_to_be_late() -> None:
    slow = Slow(answer_s=0.05)
    sent = await send_all((Order(b"", 0.0, 1) for _ in range(5)), slow.send, max_under_way=1)
    assert sent.client.late_ms_p99 > 190
    assert sent.records[0].due_s == sent.records[4].due_s


async def test_requests_are_made_only_a_little_ahead() -> None:
    num_made = 0

    def requests() -> Iterator[LoadRequest]:
        nonlocal num_made
        for _ in range(1000):
            num_made += 1
            yield REQUEST

    most_ahead = 0
    slow = Slow(answer_s=0.0)

    async def send(body: bytes) -> RequestRecord:
        nonlocal most_ahead
        most_ahead = max(most_ahead, num_made - len(slow.bodies))
        return await slow.send(body)

    sent = await send_all(orders_of(requests(), lambda _: b"", None), send, max_under_way=4)
    assert len(sent.records) == 1000
    assert most_ahead < 100


async def test_a_dataset_that_breaks_ends_the_run_with_its_error() -> None:
    def requests() -> Iterator[LoadRequest]:
        yield REQUEST
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2"):
        await send_all(orders_of(requests(), lambda _: b"", None), Slow().send, max_under_way=4)


async def test_a_client_that_is_busy_with_something_else_is_noticed() -> None:
    async def send(_: bytes) -> RequestRecord:
        time.sleep(0.06)
        sum(range(20_000))
        await asyncio.sleep(0)
        return RequestRecord(sent_s=time.monotonic())

    sent = await send_all((Order(b"", None, 1) for _ in range(8)), send, max_under_way=1)
    assert sent.client.event_loop_lag_ms_max > 20
    assert sent.client.cpu_share > 0
    assert sent.client.is_bottleneck


def test_a_core_used_up_is_a_bottleneck_and_half_of_one_is_not() -> None:
    def load(cpu_share: float) -> ClientLoad:
        return ClientLoad(
            event_loop_lag_ms_mean=0.1,
            event_loop_lag_ms_p99=1.0,
            event_loop_lag_ms_max=2.0,
            cpu_share=cpu_share,
            late_ms_p99=0.0,
            max_under_way=1,
        )

    assert load(0.95).is_bottleneck
    assert not load(0.5).is_bottleneck


def test_open_files_are_allowed_for_hundreds_of_connections() -> None:
    assert file_limit() >= 900
