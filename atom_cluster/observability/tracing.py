"""Tracer: timelines of requests as OpenTelemetry traces, sent to a collector by OTLP over HTTP.

A trace is made when its request has ended, from the same spans as the timeline, so engines carry no tracing. Its spans
hang below the client's `traceparent` if there is one. They wait in a bounded queue for a thread that sends them; while
no collector answers, spans are dropped and nobody waits.

    POST /v1/chat/completions          the request, at the ingress
    ├── read, check, prepare           see `timeline.TimelineSpan.name`
    ├── generate                       once per output and attempt
    │   ├── route, wire, queue, prefill, publish, kv_transfer, first_decode, decode ...
    └── answer

Attributes are those of the semantic conventions for HTTP and for generative AI, where these have one, and
`atom_cluster.*` elsewhere. Needs the packages of the extra `tracing`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atom_cluster.errors import ConfigError
from atom_cluster.observability.timeline import (
    RequestRecord,
    Timeline,
    TimelineAttempt,
    TimelineOutput,
    TimelineSpan,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import SpanContext, SpanKind

_OPERATIONS = {"/v1/completions": "text_completion"}
_NS = 1_000_000_000
_EXPORT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0

Attribute = str | int | float | tuple[str, ...]
Attributes = Mapping[str, Attribute]


class Tracer:
    """Used from one thread; the thread that sends is its own. `close` it."""

    def __init__(
        self,
        *,
        endpoint: str,
        sample_ratio: float,
        service_name: str,
        ingress: str,
        model: str,
        max_queued_spans: int,
        send_period_s: float,
    ) -> None:
        """`endpoint` is the collector's URL for traces, with its path. `sample_ratio` of the requests that bring no
        `traceparent` are traced; the others are if their `traceparent` says that they are sampled.

        Raises `ConfigError` if the packages are not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as exc:
            raise ConfigError(
                f"observability.tracing: {exc.name} is not installed; install atom-cluster[tracing]"
            ) from exc
        self._model = model
        self._sampler: Sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._ids = RandomIdGenerator()
        self._resource = Resource.create({"service.name": service_name, "service.instance.id": ingress})
        self._scope = InstrumentationScope("atom_cluster")
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=max_queued_spans,
            max_export_batch_size=min(512, max_queued_spans),
            schedule_delay_millis=send_period_s * 1000,
            export_timeout_millis=_EXPORT_TIMEOUT_S * 1000,
        )

    def trace(self, record: RequestRecord, timeline: Timeline) -> None:
        """Queue the trace of a request that has ended, if it is sampled."""
        from opentelemetry.trace import SpanKind

        parent, trace_id = self._sampled(record)
        if trace_id is None:
            return
        writer = _Writer(self, trace_id, int(record.created * _NS))
        root = writer.write(
            _Entry(
                name=f"{record.method} {record.route}",
                kind=SpanKind.SERVER,
                start_s=0.0,
                end_s=timeline.latency_s,
                attributes=_request_attributes(record, self._model),
                error=record.error,
                is_failure=record.status >= 500,
            ),
            parent,
        )
        for output in timeline.outputs:
            writer.write_output(output, root)

    def _sampled(self, record: RequestRecord) -> tuple[SpanContext | None, int | None]:
        """The client's span, if it named one, and the id of the trace to write, if one is to be written."""
        from opentelemetry.context import Context
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": record.traceparent}, context=Context())
        client = get_current_span(context).get_span_context()
        parent = client if client.is_valid else None
        trace_id = self._ids.generate_trace_id() if parent is None else parent.trace_id
        decision = self._sampler.should_sample(context, trace_id, record.route).decision
        return parent, trace_id if decision is Decision.RECORD_AND_SAMPLE else None

    def queue(self, entry: _Entry, trace_id: int, arrived_ns: int, parent: SpanContext | None) -> SpanContext:
        """Queue one span that is over; what others hang below. Made by hand: the usual way, to begin a span and to end
        it, takes five times as long, which a loop that serves requests notices."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        context = SpanContext(
            trace_id, self._ids.generate_span_id(), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        attributes = {**entry.attributes, "error.type": entry.error} if entry.error else dict(entry.attributes)
        self._processor.on_end(
            ReadableSpan(
                entry.name,
                context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                kind=entry.kind,
                status=Status(StatusCode.ERROR, entry.error or None) if entry.is_failure else Status(StatusCode.UNSET),
                start_time=arrived_ns + round(entry.start_s * _NS),
                end_time=arrived_ns + round(entry.end_s * _NS),
                instrumentation_scope=self._scope,
            )
        )
        return context

    def flush(self) -> None:
        """Send what is queued. Waits for the collector, or for each batch as long as one may take."""
        self._processor.force_flush()

    def close(self) -> None:
        """Send what is queued, if that is quick, and stop."""
        # The processor would go on for as long as a collector that is away lets it.
        closing = threading.Thread(target=self._processor.shutdown, name="tracer-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)
        self._exporter.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One span. Times are from the request's arrival."""

    name: str
    kind: SpanKind
    start_s: float
    end_s: float
    attributes: Attributes
    error: str = ""
    is_failure: bool = False


class _Writer:
    """Writes the spans of one trace."""

    def __init__(self, tracer: Tracer, trace_id: int, arrived_ns: int) -> None:
        self._tracer = tracer
        self._trace_id = trace_id
        self._arrived_ns = arrived_ns
        self._has_common = False

    def write(self, entry: _Entry, parent: SpanContext | None) -> SpanContext:
        """One span."""
        return self._tracer.queue(entry, self._trace_id, self._arrived_ns, parent)

    def write_output(self, output: TimelineOutput, root: SpanContext) -> None:
        """Spans of one output. What outputs have in common, before they are generated, is there once."""
        spans = list(output.spans)
        if self._has_common:
            spans = [span for span in spans if span.name not in ("read", "check", "prepare")]
        self._has_common = True
        self._leaves((span for span in spans if not span.attempt), root)
        for number, attempt in enumerate(output.attempts, 1):
            own = [span for span in spans if span.attempt == number]
            if own:
                self._attempt(output, number, attempt, own, root)

    def _attempt(
        self,
        output: TimelineOutput,
        number: int,
        attempt: TimelineAttempt,
        own: list[TimelineSpan],
        root: SpanContext,
    ) -> None:
        from opentelemetry.trace import SpanKind

        attributes: dict[str, Attribute] = {
            "atom_cluster.output": output.index,
            "atom_cluster.attempt": number,
            "atom_cluster.engine": attempt.engine,
            "atom_cluster.route.reason": attempt.reason,
            "gen_ai.usage.output_tokens": attempt.num_tokens,
        }
        if attempt.prefill:
            attributes["atom_cluster.prefill"] = attempt.prefill
        if attempt.kv_read_bytes:
            attributes["atom_cluster.kv_read.bytes"] = attempt.kv_read_bytes
            attributes["atom_cluster.kv_read.seconds"] = attempt.kv_read_s
        entry = _Entry(
            name="generate",
            kind=SpanKind.CLIENT,
            start_s=own[0].start_s,
            end_s=own[-1].start_s + own[-1].duration_s,
            attributes=attributes,
            error=attempt.error,
            is_failure=bool(attempt.error),
        )
        self._leaves(own, self.write(entry, root))

    def _leaves(self, spans: Iterable[TimelineSpan], parent: SpanContext) -> None:
        from opentelemetry.trace import SpanKind

        for span in spans:
            if span.duration_s <= 0:
                continue  # a clock that runs at another speed; see the timeline
            attributes: dict[str, Attribute] = {"atom_cluster.replica": span.replica} if span.replica else {}
            if span.num_steps:
                attributes["atom_cluster.steps"] = span.num_steps
            entry = _Entry(
                name=span.name,
                kind=SpanKind.INTERNAL,
                start_s=span.start_s,
                end_s=span.start_s + span.duration_s,
                attributes=attributes,
            )
            self.write(entry, parent)


def _request_attributes(record: RequestRecord, model: str) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.operation.name": _OPERATIONS.get(record.route, "chat"),
        "gen_ai.provider.name": "atom_cluster",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "atom_cluster.request_id": record.request_id,
    }
    if record.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.ttft_s
    if record.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = record.finish_reasons
    if len(record.outputs) > 1:
        attributes["gen_ai.request.choice.count"] = len(record.outputs)
    return attributes
