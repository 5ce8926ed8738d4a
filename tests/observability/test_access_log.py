"""One line per request, with what is needed to find it elsewhere; none that clients can multiply at will."""

from __future__ import annotations

import json
import logging

import pytest

from atom_cluster.observability.access_log import LOGGER, MAX_REFUSED_LINES_PER_S, AccessLog, fields_of
from atom_cluster.observability.timeline import AttemptRecord, OutputRecord, RequestRecord
from tests.fakes import VirtualClock


def record_of(status: int = 200, route: str = "/v1/chat/completions") -> RequestRecord:
    attempt = AttemptRecord(1.0, engine="decode-1", prefill="prefill-1")
    attempt.hear(3, None, 1.5)
    return RequestRecord(
        arrived_s=1.0,
        created=1.7e9,
        ended_s=3.0,
        method="POST",
        route=route,
        status=status,
        request_id="mine",
        key_name="team-a",
        answer_id="chatcmpl-1",
        num_prompt_tokens=7,
        outputs=[OutputRecord(attempts=[attempt])],
    )


def test_a_line_says_what_who_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        AccessLog().write(record_of())
    assert caplog.messages == ["POST /v1/chat/completions 200 in 2.000 s"]
    assert fields_of(record_of()) == {
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "total_s": 2.0,
        "id": "chatcmpl-1",
        "key": "team-a",
        "prompt_tokens": 7,
        "output_tokens": 3,
        "engine": "decode-1",
        "prefill": "prefill-1",
        "ttft_s": 0.5,
    }
    assert json.dumps(fields_of(record_of()))


def test_a_request_without_outputs_says_less() -> None:
    record = record_of(401)
    record.outputs, record.answer_id, record.key_name = [], "", ""
    assert set(fields_of(record)) == {"request_id", "method", "route", "status", "total_s"}


def test_probes_are_not_worth_a_line_unless_they_fail(caplog: pytest.LogCaptureFixture) -> None:
    log = AccessLog()
    with caplog.at_level(logging.INFO, LOGGER):
        log.write(record_of(200, "/health"))
        log.write(record_of(503, "/ready"))
    assert [message.split()[1:3] for message in caplog.messages] == [["/ready", "503"]]


def test_a_flood_of_refused_requests_is_counted_instead_of_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock(at_s=1000.0)
    log = AccessLog(clock=clock)
    with caplog.at_level(logging.INFO, LOGGER):
        for _ in range(5000):
            log.write(record_of(401))
        clock.sleep(11.0)
        log.write(record_of(200))
    assert len(caplog.messages) <= MAX_REFUSED_LINES_PER_S + 3
    counts = [message for message in caplog.messages if message.startswith("refused requests")]
    numbers = sum(int(message.split(":")[1].split(",")[0]) for message in counts)
    assert numbers == 5000 - MAX_REFUSED_LINES_PER_S
    assert caplog.messages[-1].endswith("200 in 2.000 s")
