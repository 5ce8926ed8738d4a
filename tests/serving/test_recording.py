"""What the configuration says is what an ingress records and what logs look like."""

from __future__ import annotations

import io
import json
import logging

import pytest

from atom_cluster.config.observability import ObservabilityConfig, TracingConfig
from atom_cluster.observability import logging as own_logging
from atom_cluster.serving.recording import make_recorder, set_up_logs


def test_everything_can_be_turned_off() -> None:
    config = ObservabilityConfig(access_log=False, timelines=0)
    recorder = make_recorder(config, ingress="i", model="m")
    assert (recorder.store.max_timelines, recorder.access_log, recorder.tracer) == (0, None, None)


def test_traces_go_where_the_configuration_says() -> None:
    config = ObservabilityConfig(tracing=TracingConfig(endpoint="http://127.0.0.1:9/v1/traces", sample_ratio=0))
    recorder = make_recorder(config, ingress="i", model="m")
    assert recorder.tracer is not None
    recorder.tracer.close()
    assert (recorder.store.max_timelines, recorder.access_log is not None) == (1000, True)


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", ""])
def test_an_endpoint_is_a_url_of_http(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        TracingConfig(endpoint=endpoint)


def test_logs_of_a_process_name_its_role_and_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(own_logging.sys, "stderr", stream)
    set_up_logs(ObservabilityConfig(log_format="json", log_level="WARNING"), role="router", replica="router-1")
    logging.getLogger("atom_cluster.x").info("quiet")
    logging.getLogger("atom_cluster.x").warning("loud")
    (entry,) = map(json.loads, stream.getvalue().splitlines())
    assert (entry["message"], entry["role"], entry["replica"]) == ("loud", "router", "router-1")
