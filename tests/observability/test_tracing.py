"""Traces as a collector gets them: one tree per request, with its timeline's times. Without a collector, no harm."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from atom_cluster.errors import ConfigError
from atom_cluster.messages.timing import EngineSpan, RequestTiming
from atom_cluster.observability.timeline import AttemptRecord, OutputRecord, RequestRecord, compose
from atom_cluster.observability.tracing import Tracer

CREATED_S = 1_700_000_000
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"


class Collector:
    """Takes what is exported to it over HTTP on loopback."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            self.resource = values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans.extend(scope.spans)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def values(attributes: Any) -> dict[str, Any]:
    def value_of(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [value_of(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {entry.key: value_of(entry.value) for entry in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def make_tracer(endpoint: str, *, sample_ratio: float = 1.0, max_queued_spans: int = 1000) -> Tracer:
    return Tracer(
        endpoint=endpoint,
        sample_ratio=sample_ratio,
        service_name="atom_cluster",
        ingress="ingress-1",
        model="a/model",
        max_queued_spans=max_queued_spans,
        send_period_s=60.0,
    )


def record_of(traceparent: str = "") -> RequestRecord:
    """Two outputs; the second one's engine was lost before it said anything."""
    timing = RequestTiming(
        spans=(
            EngineSpan("queue", 0.25),
            EngineSpan("wire", 0.125),
            EngineSpan("prefill", 1.0, 4, True),
            EngineSpan("wire", 0.125),
            EngineSpan("kv_transfer", 0.5),
            EngineSpan("decode", 2.0, 9),
        ),
        kv_read_s=0.75,
        kv_read_bytes=4096,
    )
    good = AttemptRecord(1.0, engine="decode-1", prefill="prefill-1", reason="cache", sent_s=2.0)
    good.note("route", 2.0)
    good.hear(10, timing, 7.0)
    lost = AttemptRecord(1.0, engine="decode-2", reason="load", sent_s=2.0, ended_s=6.0, error="EngineLost")
    return RequestRecord(
        arrived_s=0.0,
        created=CREATED_S,
        method="POST",
        route="/v1/chat/completions",
        traceparent=traceparent,
        request_id="mine",
        read_s=0.5,
        checked_s=0.75,
        ended_s=8.0,
        status=500,
        error="EngineLost",
        answer_id="chatcmpl-1",
        num_prompt_tokens=7,
        outputs=[OutputRecord(attempts=[good]), OutputRecord(attempts=[lost])],
        finish_reasons=("stop", "none"),
    )


def trace(tracer: Tracer, record: RequestRecord) -> None:
    tracer.trace(record, compose(record, ingress="ingress-1"))


def offset_s(nanoseconds: int) -> float:
    return (nanoseconds - CREATED_S * 1_000_000_000) / 1e9


def tree(spans: list[Span], parent: bytes) -> list[Any]:
    children = sorted((s for s in spans if s.parent_span_id == parent), key=lambda s: (s.start_time_unix_nano, s.name))
    return [
        (s.name, offset_s(s.start_time_unix_nano), offset_s(s.end_time_unix_nano), tree(spans, s.span_id))
        for s in children
    ]


def test_a_collector_gets_the_tree_with_its_times_below_the_clients_span(collector: Collector) -> None:
    tracer = make_tracer(collector.endpoint)
    trace(tracer, record_of(SAMPLED))
    tracer.flush()
    tracer.close()
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    first: list[Any] = [
        ("route", 1.0, 2.0, []),
        ("wire", 2.0, 2.5, []),
        ("queue", 2.5, 2.75, []),
        ("wire", 2.75, 2.875, []),
        ("prefill", 2.875, 3.875, []),
        ("wire", 3.875, 4.0, []),
        ("kv_transfer", 4.0, 4.5, []),
        ("decode", 4.5, 6.5, []),
        ("wire", 6.5, 7.0, []),
    ]
    second: list[Any] = [("unattributed", 1.0, 6.0, [])]
    assert tree(collector.spans, bytes.fromhex(PARENT_ID)) == [
        (
            "POST /v1/chat/completions",
            0.0,
            8.0,
            [
                ("read", 0.0, 0.5, []),
                ("check", 0.5, 0.75, []),
                ("prepare", 0.75, 1.0, []),
                ("generate", 1.0, 7.0, first),
                ("generate", 1.0, 6.0, second),
                ("answer", 6.0, 8.0, []),
                ("answer", 7.0, 8.0, []),
            ],
        )
    ]


def test_spans_carry_the_conventions_attributes_and_who_did_it(collector: Collector) -> None:
    tracer = make_tracer(collector.endpoint)
    trace(tracer, record_of())
    tracer.close()
    assert collector.resource["service.name"] == "atom_cluster"
    assert collector.resource["service.instance.id"] == "ingress-1"
    (root,) = [span for span in collector.spans if not span.parent_span_id]
    assert values(root.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 500,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "atom_cluster",
        "gen_ai.request.model": "a/model",
        "gen_ai.response.model": "a/model",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop", "none"],
        "gen_ai.response.time_to_first_chunk": 7.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 10,
        "atom_cluster.request_id": "mine",
        "error.type": "EngineLost",
    }
    assert root.kind == Span.SPAN_KIND_SERVER and root.status.code == Status.STATUS_CODE_ERROR
    good, lost = [span for span in collector.spans if span.name == "generate"]
    assert values(good.attributes) == {
        "atom_cluster.output": 0,
        "atom_cluster.attempt": 1,
        "atom_cluster.engine": "decode-1",
        "atom_cluster.prefill": "prefill-1",
        "atom_cluster.route.reason": "cache",
        "atom_cluster.kv_read.bytes": 4096,
        "atom_cluster.kv_read.seconds": 0.75,
        "gen_ai.usage.output_tokens": 10,
    }
    assert lost.status.code == Status.STATUS_CODE_ERROR and good.status.code == Status.STATUS_CODE_UNSET
    (prefill,) = [span for span in collector.spans if span.name == "prefill"]
    assert values(prefill.attributes) == {"atom_cluster.replica": "prefill-1", "atom_cluster.steps": 4}


@pytest.mark.parametrize(
    ("traceparent", "sample_ratio", "is_traced"),
    [
        (SAMPLED, 0.0, True),
        (NOT_SAMPLED, 1.0, False),
        ("", 1.0, True),
        ("", 0.0, False),
        ("00-not a traceparent-01", 1.0, True),
        (f"00-{'0' * 32}-{PARENT_ID}-01", 0.0, False),
    ],
)
def test_who_is_traced(collector: Collector, traceparent: str, sample_ratio: float, is_traced: bool) -> None:
    tracer = make_tracer(collector.endpoint, sample_ratio=sample_ratio)
    trace(tracer, record_of(traceparent))
    tracer.close()
    assert bool(collector.spans) == is_traced


def test_a_share_of_requests_is_traced(collector: Collector) -> None:
    tracer = make_tracer(collector.endpoint, sample_ratio=0.5, max_queued_spans=20_000)
    for _ in range(200):
        trace(tracer, record_of())
    tracer.close()
    assert 50 < sum(not span.parent_span_id for span in collector.spans) < 150


def test_without_a_collector_spans_are_dropped_and_nobody_waits() -> None:
    tracer = make_tracer("http://127.0.0.1:9/v1/traces", max_queued_spans=64)
    for _ in range(200):  # some three thousand spans
        trace(tracer, record_of())
    queue = tracer._processor._batch_processor._queue
    assert len(queue) <= 64 and queue.maxlen == 64
    tracer.close()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"observability.tracing.*install atom-cluster\[tracing\]"):
        make_tracer("http://127.0.0.1:9/v1/traces")
