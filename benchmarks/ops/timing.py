"""How long an op takes on a GPU, without what it costs to launch it: replays of a graph. Knows no ops."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

BYTES_PER_SECOND = {"NVIDIA H200": 4.24e12}
"""Bytes read and written by a copy from device memory to itself, as measured; others are reported without a share."""


def time_us(calls: Sequence[Callable[[], object]], *, num_replays: int = 5, graph_ms: float = 2.0) -> float:
    """Median time of a call in microseconds. Calls come one after the other: give each other inputs, together more than
    the caches hold, unless inputs are to be found there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        once_ms = _elapsed_ms(lambda: [call() for call in calls])
        num_rounds = max(1, min(50, round(graph_ms / once_ms)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(num_rounds):
                for call in calls:
                    call()
        graph.replay()
        times_ms = [_elapsed_ms(graph.replay) for _ in range(num_replays)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times_ms) * 1e3 / (num_rounds * len(calls))


def share_of_bandwidth(num_bytes: float, microseconds: float) -> str:
    """Bytes per second, and which share of what the chip copies that is."""
    rate = num_bytes / microseconds * 1e6
    known = BYTES_PER_SECOND.get(torch.cuda.get_device_name())
    return f"{rate / 1e9:6.0f} GB/s" + ("" if known is None else f" {rate / known:4.0%}")


def _elapsed_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
