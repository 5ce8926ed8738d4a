"""MemoryMetrics against Prometheus's own parser, and its refusals."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from atom_cluster.observability.memory import MemoryMetrics, prometheus_text
from atom_cluster.observability.metrics import (
    ITL_S,
    KV_BLOCKS,
    KV_READS,
    KV_TRANSFER_S,
    REQUESTS_FINISHED,
    REQUESTS_MOVED,
    REQUESTS_RUNNING,
    MetricSink,
    NullMetrics,
)


def _samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_both_sinks_fulfil_the_protocol() -> None:
    sinks: list[MetricSink] = [NullMetrics(), MemoryMetrics()]
    for sink in sinks:
        sink.inc(REQUESTS_MOVED)
        sink.set(REQUESTS_RUNNING, 3)
        sink.observe(ITL_S, 0.2)


def test_counters_add_up_and_gauges_are_replaced() -> None:
    metrics = MemoryMetrics()
    metrics.inc(REQUESTS_FINISHED, reason="stop")
    metrics.inc(REQUESTS_FINISHED, 2, reason="stop")
    metrics.inc(REQUESTS_FINISHED, reason="error")
    assert metrics.value(REQUESTS_FINISHED) == 4
    metrics.set(KV_BLOCKS, 7, state="free")
    metrics.set(KV_BLOCKS, 5, state="free")
    assert metrics.value(REQUESTS_FINISHED, reason="stop") == 3
    assert metrics.value(REQUESTS_FINISHED, reason="error") == 1
    assert metrics.value(KV_BLOCKS, state="free") == 5
    assert metrics.value(KV_BLOCKS, state="cached") == 0


def test_text_is_what_prometheus_reads() -> None:
    decode, prefill = MemoryMetrics(), MemoryMetrics()
    decode.inc(REQUESTS_FINISHED, 2, reason='a "quoted"\\\n reason')
    decode.observe(ITL_S, ITL_S.buckets[0])
    decode.observe(ITL_S, 1e9)
    prefill.inc(REQUESTS_FINISHED, 123456789, reason="stop")
    text = prometheus_text([({"replica": "d0"}, decode), ({"replica": "p0"}, prefill)])
    samples = _samples(text)
    assert text.count("# TYPE atom_requests_finished_total counter") == 1
    name = "atom_requests_finished_total"
    assert samples[name, (("reason", 'a "quoted"\\\n reason'), ("replica", "d0"))] == 2
    assert samples[name, (("reason", "stop"), ("replica", "p0"))] == 123456789
    first, last = f"{ITL_S.buckets[0]:g}", f"{ITL_S.buckets[-1]:g}"
    assert samples[f"{ITL_S.name}_bucket", (("le", first), ("replica", "d0"))] == 1
    assert samples[f"{ITL_S.name}_bucket", (("le", last), ("replica", "d0"))] == 1
    assert samples[f"{ITL_S.name}_bucket", (("le", "+Inf"), ("replica", "d0"))] == 2
    assert samples[f"{ITL_S.name}_count", (("replica", "d0"),)] == 2
    assert samples[f"{ITL_S.name}_sum", (("replica", "d0"),)] == 1e9 + ITL_S.buckets[0]


def test_a_recording_that_contradicts_the_table_is_refused() -> None:
    metrics = MemoryMetrics()
    with pytest.raises(ValueError, match="is a gauge, recorded as a counter"):
        metrics.inc(REQUESTS_RUNNING)
    with pytest.raises(ValueError, match=r"has the labels \['reason'\], recorded with \[\]"):
        metrics.inc(REQUESTS_FINISHED)
    with pytest.raises(ValueError, match="recorded with"):
        metrics.inc(REQUESTS_MOVED, reason="stop")
    with pytest.raises(ValueError, match="asked for"):
        metrics.value(REQUESTS_FINISHED, cause="stop")
    with pytest.raises(ValueError, match="cannot go down"):
        metrics.inc(REQUESTS_MOVED, -1)


def test_what_is_asked_for_with_some_labels_is_the_sum_over_the_others() -> None:
    metrics = MemoryMetrics()
    for transport, outcome, count in (("shm", "ok", 3), ("shm", "failed", 1), ("tcp", "ok", 5)):
        metrics.inc(KV_READS, count, transport=transport, outcome=outcome)
        metrics.observe(KV_TRANSFER_S, 0.01 * count, transport=transport)
    assert metrics.value(KV_READS, transport="shm") == 4
    assert metrics.value(KV_READS, outcome="ok") == 8
    assert metrics.histogram(KV_TRANSFER_S).count == 3
    assert metrics.histogram(KV_TRANSFER_S, transport="shm").sum == pytest.approx(0.04)
    assert metrics.series(KV_READS)["tcp", "ok"] == 5
