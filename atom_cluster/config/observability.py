"""Logs, metrics, traces."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class ProfileConfig(FrozenConfig):
    """Traces of single steps, recorded while somebody asks for them; see docs/profiling.md."""

    directory: str | None = None
    """Where every rank writes its traces, on its own host. null: nobody can record any."""
    with_stack: bool = False
    """Record where in the Python code each op was called, which slows steps down a lot."""
    record_shapes: bool = False
    """Record the shapes of each op's inputs."""
    max_steps: int = Field(default=256, ge=1, le=100_000)
    """A window that nobody stops ends after so many steps. A step of a large model adds up to some MB to a trace."""


class TracingConfig(FrozenConfig):
    """Traces of requests, for a collector of OpenTelemetry; see docs/tracing.md. Needs `atom-cluster[tracing]`."""

    endpoint: str = Field(pattern=r"^https?://")
    """The collector's URL for traces by OTLP over HTTP, with its path, such as `http://collector:4318/v1/traces`.
    Headers that it asks for are taken from the environment variable `OTEL_EXPORTER_OTLP_HEADERS`."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests without a `traceparent` header that are traced. Of those with one, all that it says are
    sampled."""
    service_name: str = Field(default="atom_cluster", min_length=1)
    """`service.name` of the spans."""
    max_queued_spans: int = Field(default=4096, ge=64, le=1_000_000)
    """Spans that wait to be sent, per ingress. While the collector is away, what comes beyond is dropped. A request has
    about 18, each about 1 KB in memory."""
    send_period_s: float = Field(default=1.0, gt=0)
    """How often spans are sent."""


class ObservabilityConfig(FrozenConfig):
    """What is recorded."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""
    log_format: Literal["text", "json"] = "text"
    """text: a line for people. json: one JSON object per line."""
    access_log: bool = True
    """One line per HTTP request when it has ended, with its times and who computed it, and nothing of what it said."""
    timelines: int = Field(default=1000, ge=0, le=100_000)
    """Requests of which each ingress keeps where their time went, for /v1/requests/{id}/timeline: about 2 KB each.
    0 keeps none."""
    tracing: TracingConfig | None = None
    """Traces of requests. null: none."""
    metrics_period_s: float = Field(1.0, gt=0)
    """How often engines export gauges."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of single steps, on demand."""
