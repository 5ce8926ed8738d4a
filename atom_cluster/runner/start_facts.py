"""What one rank turned out to be, in numbers, once it is ready: memory by use, captured graphs, seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.messages.start import StartFacts
from atom_cluster.models.protocol import CausalLM
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.model_runner import ModelRunner


def start_facts(
    runner: ModelRunner, model: CausalLM, memory: KvMemory, *, graph_bytes: int, parts_s: Mapping[str, float]
) -> StartFacts:
    """graph_bytes: what capturing took. parts_s: seconds by part of the start."""
    captured = (runner.graphs, runner.pieces)
    num_graphs, num_pieces = (0 if part is None else part.num_captured for part in captured)
    return StartFacts(
        weight_bytes=weight_bytes(model),
        kv_bytes=memory.num_bytes,
        graph_bytes=graph_bytes,
        num_graphs=num_graphs,
        num_pieces=num_pieces,
        capture_s=sum(part.capture_s for part in captured if part is not None),
        parts_s=dict(parts_s),
    )


def weight_bytes(model: object) -> int:
    """Memory of all tensors that a loaded model holds, packed ones as packed. Shared memory counts once."""
    return sum(dict(_holdings(model, set())).values())


def _holdings(value: object, seen: set[int]) -> Iterator[tuple[int, int]]:
    """What is found among the attributes of a model's parts and of the ops that they have prepared: where, bytes."""
    if id(value) in seen or isinstance(value, (LayerContext, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _holdings(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _holdings(item, seen)
    elif type(value).__module__.startswith("atom_cluster."):
        # What a library packed shows no tensor; the op that had it packed knows its size.
        yield id(value), getattr(value, "num_packed_bytes", 0)
        for name in _attribute_names(value):
            yield from _holdings(getattr(value, name, None), seen)


def _attribute_names(value: object) -> Iterator[str]:
    yield from getattr(value, "__dict__", ())
    for kind in type(value).__mro__:
        yield from getattr(kind, "__slots__", ())
