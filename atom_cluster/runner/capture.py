"""Capturing work of a GPU in graphs. Knows no steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """Work is issued to a stream of its own, as captures need it. Waits for the device before and after.

    No garbage is collected meanwhile: a tensor or graph that goes while another is captured would spoil that.
    """
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        if was_enabled:
            gc.enable()
        torch.cuda.synchronize(device)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Within `capture_stream`: what is issued becomes the graph, and is not run. pool: of `graph_pool_handle`.

    Other threads may use the device meanwhile. An error ends the capture.
    """
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        # A capture that was invalidated says so when it is ended; the first error is the one to tell.
        with _quiet():
            graph.capture_end()
        raise
    graph.capture_end()


@contextmanager
def _quiet() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        return


def without_owning(x: torch.Tensor) -> torch.Tensor:
    """The same memory, kept by others: the pool of graphs hands it out again to those captured later.

    For what a graph leaves behind and only work directly behind its replay reads. If torch has no way to do that, the
    tensor itself.
    """
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is None:
        return x
    owner = x.untyped_storage()
    storage = construct(owner.data_ptr(), x.device, owner.nbytes())
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(storage, x.storage_offset(), x.size(), x.stride())
