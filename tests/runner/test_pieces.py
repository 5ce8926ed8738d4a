"""Steps with prompts in pieces give what whole passes do, for as many tokens as were recorded and for fewer.

Graphs are stand-ins here: a replay repeats the tensor operations that were issued while it was captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atom_cluster.runner import build, pieces
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.pieces import PiecewiseForward
from tests.equivalence.generation import generate, mixed_requests

SIZES = (8, 16, 40)
SETTINGS = {"max_num_batched_tokens": 40, "ops_backend": "torch"}


class StandInGraph:
    """Operations, and the memory that they left their results in."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def replay(self) -> None:
        for operation, arguments, options, results in self.operations:
            for old, new in zip(results, tree_leaves(operation(*arguments, **options)), strict=True):
                is_tensor = isinstance(old, torch.Tensor)
                if is_tensor and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    def __init__(self, graph: StandInGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._graph.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


@contextlib.contextmanager
def captured(graph: StandInGraph, pool: object) -> Iterator[None]:
    with Capture(graph):
        yield


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PiecewiseForward]:
    """Runners that are built from now on have pieces, recorded when they are needed."""
    found: list[PiecewiseForward] = []

    def add_pieces(runner: ModelRunner, *_: object) -> tuple[str, int]:
        runner.pieces = PiecewiseForward(
            model=runner._program._model,
            inputs=runner._inputs,
            table=runner._table,
            ops=runner._ops,
            sizes=SIZES,
            pool=None,
            device=runner.device,
        )
        found.append(runner.pieces)
        return "stand-ins", 0

    monkeypatch.setattr(build, "_capture", add_pieces)
    monkeypatch.setattr(pieces, "captured", captured)
    monkeypatch.setattr(pieces, "capture_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pieces, "without_owning", lambda x: x)  # there is no pool that would keep it
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", "deepseek_v3_dense"])
def test_pieces_give_what_a_whole_pass_does(name: str, built: list[PiecewiseForward]) -> None:
    with pytest.MonkeyPatch.context() as without:
        without.setattr(build, "_capture", lambda *_: ("none", 0))
        expected = generate(name, mixed_requests(), **SETTINGS)
    assert generate(name, mixed_requests(), **SETTINGS) == expected
    assert set(built[0]._recordings) == set(SIZES)


class StandInEvent:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: StandInEvent) -> float:
        return 0.0


def test_all_sizes_are_recorded_and_timed_before_the_first_step(
    built: list[PiecewiseForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lazily = generate("llama", mixed_requests(), **SETTINGS)
    add_pieces = build._capture

    def add_and_record(runner: ModelRunner, *rest: Any) -> tuple[str, int]:
        added = add_pieces(runner, *rest)
        assert runner.capture_graphs() == {}
        assert runner.pieces is not None and runner.pieces.num_captured == len(SIZES)
        return added

    monkeypatch.setattr(build, "_capture", add_and_record)
    assert generate("llama", mixed_requests(), **SETTINGS) == lazily


def test_a_model_that_cannot_be_divided_goes_on_without_pieces(built: list[PiecewiseForward]) -> None:
    requests = mixed_requests()[:3]
    found = generate("deepseek_v32", requests, **SETTINGS)
    assert not built[0].takes(1)
    assert found == generate("deepseek_v32", requests, **SETTINGS)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PiecewiseForward]:
    """Pieces without a model, of sizes 1, 2, 3, ... whose passes take so long; the host needs 10 ms to launch any."""

    def record(
        device_ms: Sequence[float], agree: Callable[[bool], bool] = bool, *, max_size: int = 99
    ) -> PiecewiseForward:
        nothing: Any = None
        part = PiecewiseForward(
            model=nothing,
            inputs=nothing,
            table=nothing,
            ops=nothing,
            sizes=range(1, len(device_ms) + 1),
            pool=None,
            device=torch.device("cpu"),
        )
        monkeypatch.setattr(pieces, "capture_stream", lambda device: contextlib.nullcontext())

        def record_one(size: int) -> None:
            if size > max_size:
                raise torch.OutOfMemoryError
            part._recordings[size] = nothing

        monkeypatch.setattr(part, "_record", record_one)
        monkeypatch.setattr(part, "_time", lambda size: pieces._PassTimes(issue_ms=10.0, device_ms=device_ms[size - 1]))
        part.record_all(agree)
        return part

    return record


@pytest.mark.parametrize(
    ("device_ms", "expected"),
    [
        # Nothing is bound by the device.
        ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), [1, 2, 3, 4, 5, 6]),
        # The first of two in a row stays, as the largest.
        ((1.0, 2.0, 3.0, 11.0, 12.0, 13.0), [1, 2, 3, 4]),
        # One alone is no reason to end, and is dropped if a larger one is faster.
        ((1.0, 2.0, 13.0, 9.0, 11.0, 12.0), [1, 2, 4, 5]),
        # A little faster may be chance.
        ((1.0, 2.0, 3.1, 3.0, 5.0, 6.0), [1, 2, 3, 4, 5, 6]),
        # Nor is one taken that is much larger.
        ((3.0, 2.0, 2.0, 5.0, 5.1, 6.0), [1, 2, 3, 4, 5, 6]),
        ((11.0, 12.0, 13.0, 14.0, 15.0, 16.0), [1]),
    ],
)
def test_sizes_that_only_lose_are_not_kept(
    recorded: Callable[..., PiecewiseForward], device_ms: tuple[float, ...], expected: list[int]
) -> None:
    part = recorded(device_ms)
    assert part._sizes == expected and list(part._recordings) == expected
    assert part.describe().startswith(f"{len(expected)} sizes")


def test_sizes_end_where_memory_does(recorded: Callable[..., PiecewiseForward]) -> None:
    part = recorded((1.0, 2.0, 3.0, 4.0), max_size=2)
    assert part._sizes == [1, 2] and list(part._recordings) == [1, 2]
    with pytest.raises(RuntimeError, match="no memory for steps of 1 tokens"):
        recorded((1.0, 2.0), max_size=0)


def test_ranks_keep_the_same_sizes(recorded: Callable[..., PiecewiseForward]) -> None:
    """One rank alone is bound by its device, finds the larger of two sizes faster, and has memory for a fourth."""
    asked: list[bool] = []

    def agree(is_so: bool) -> bool:
        asked.append(is_so)
        return len(asked) in (1, 2, 4)  # the first three sizes are there

    assert recorded((20.0, 15.0, 12.0, 9.0), agree)._sizes == [1, 2, 3]
    assert asked == [True, True, True, True, True, True, False, True, False]
