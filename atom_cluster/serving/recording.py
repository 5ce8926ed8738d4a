"""From the configuration to what an ingress records of its requests, and to how processes of Serve write their logs."""

from __future__ import annotations

from atom_cluster.api.http.request_record import Recorder
from atom_cluster.config.observability import ObservabilityConfig, TracingConfig
from atom_cluster.observability.access_log import AccessLog
from atom_cluster.observability.logging import setup_logging
from atom_cluster.observability.timeline_store import TimelineStore
from atom_cluster.observability.tracing import Tracer


def make_recorder(config: ObservabilityConfig, *, ingress: str, model: str) -> Recorder:
    """What one ingress records. Raises `ConfigError` if traces are wanted and their packages are not installed."""
    return Recorder(
        ingress=ingress,
        store=TimelineStore(config.timelines),
        access_log=AccessLog() if config.access_log else None,
        tracer=None if config.tracing is None else _tracer(config.tracing, ingress=ingress, model=model),
    )


def set_up_logs(config: ObservabilityConfig, *, role: str, replica: str) -> None:
    """Make this process's logs what the configuration says: to standard error, which Ray keeps a file of."""
    setup_logging(config.log_level, config.log_format, role=role, replica=replica)


def _tracer(config: TracingConfig, *, ingress: str, model: str) -> Tracer:
    return Tracer(
        endpoint=config.endpoint,
        sample_ratio=config.sample_ratio,
        service_name=config.service_name,
        ingress=ingress,
        model=model,
        max_queued_spans=config.max_queued_spans,
        send_period_s=config.send_period_s,
    )
