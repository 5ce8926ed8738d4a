"""Stands for CUDA graphs where there is no GPU: a replay does again what was captured, and leaves it where that did.

As on a GPU, memory that a capture returned stays where it is, what is captured runs before, and a replay sees what its
inputs hold then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import pytest
import torch

from atom_cluster.messages.steps import RowStep
from atom_cluster.ops.sampling import Draw
from atom_cluster.runner import graphs
from atom_cluster.runner.graphs import GraphedStep, StepGraphs
from atom_cluster.runner.step_program import Outcome

T = TypeVar("T")


class StandInGraph:
    """See the module's docstring."""

    issue: Callable[[], object]
    result: object

    def replay(self) -> None:
        overwrite(self.result, self.issue())


def overwrite(old: Any, new: Any) -> None:
    """What `new` says, in the memory of `old`: tensors, and in data classes whatever they have."""
    if isinstance(old, torch.Tensor):
        old.copy_(new.clone())
    elif is_dataclass(old):
        for field in fields(old):
            before, after = getattr(old, field.name), getattr(new, field.name)
            if isinstance(before, int | tuple) and not any(isinstance(x, torch.Tensor) for x in as_tuple(before)):
                object.__setattr__(old, field.name, after)
            else:
                overwrite(before, after)
    elif isinstance(old, Mapping):
        for key in old:
            overwrite(old[key], new[key])
    elif isinstance(old, tuple):
        for before, after in zip(old, new, strict=True):
            overwrite(before, after)


def copied(outcome: Outcome) -> Outcome:
    drafts = None if outcome.drafts is None else outcome.drafts.clone()
    return Outcome(token_ids=outcome.token_ids.clone(), num_kept=outcome.num_kept.clone(), drafts=drafts)


def as_tuple(x: object) -> tuple[object, ...]:
    return x if isinstance(x, tuple) else (x,)


def use_stand_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured by `StandInGraph`s."""

    def record(self: StepGraphs, graph: StandInGraph, issue: Callable[[], T]) -> T:
        issue()
        graph.issue = issue
        result = issue()
        graph.result = result
        return result

    def run(self: StepGraphs, steps: Sequence[RowStep], draw: Draw | None) -> GraphedStep:
        # On a CPU what goes to the host is no copy, but is read when the next step may be under way.
        graphed = issue_run(self, steps, draw)
        return graphed if graphed.outcome is None else replace(graphed, outcome=copied(graphed.outcome))

    issue_run = StepGraphs.run
    empty = torch.empty
    monkeypatch.setattr(StepGraphs, "run", run)
    monkeypatch.setattr(StepGraphs, "_record", record)
    monkeypatch.setattr(graphs, "capture_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
