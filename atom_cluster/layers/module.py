"""Module: what layers and models have in common. Parts are found among the attributes, in the order they were set.

Life of a module: built with uninitialised tensors; `weight_parts` says where checkpoint tensors go; `finish_loading`
prepares it for its first step. It keeps nothing between steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from atom_cluster.kv_cache.layout import LayerLayout
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertsOp
from atom_cluster.parallel.sharding import WeightParts


class Module:
    """A part of a model. Attributes that are modules, or tuples of modules, are its own parts."""

    def parts(self) -> Iterator[Module]:
        """Direct parts."""
        for value in vars(self).values():
            if isinstance(value, Module):
                yield value
            elif isinstance(value, tuple):
                yield from (item for item in value if isinstance(item, Module))

    def modules(self) -> Iterator[Module]:
        """This module and everything it is made of, depth first."""
        yield self
        for part in self.parts():
            yield from part.modules()

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names. Valid until `finish_loading`."""
        merged: dict[str, WeightParts] = {}
        for part in self.parts():
            found = part.weight_parts()
            if twice := merged.keys() & found.keys():
                raise AssertionError(f"two layers want the same tensors: {sorted(twice)}")
            merged.update(found)
        return merged

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend, part by part to keep the peak of memory low."""
        for part in self.parts():
            part.finish_loading()

    @property
    def widest(self) -> int:
        """Most numbers per token of a step that it holds at once, beside its input and its output. An estimate, for
        planning: what kernels take for themselves is not in it."""
        return max((part.widest for part in self.parts()), default=0)

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """Every matrix product in here, prepared."""
        return [op for part in self.parts() for op in part.linear_ops()]


class CachingModule(Module):
    """A module that keeps something per token or per request, in memory that the runner owns."""

    cache_layout: LayerLayout
    """What it keeps. Set in `__init__`."""
    cache_index: int
    """Which of a step's `ForwardBatch.caches` is its own. Set by the model that it is part of."""


def number_caches(model: Module) -> tuple[LayerLayout, ...]:
    """Give every caching module of a model its `cache_index`; their layouts in that order."""
    owners = [module for module in model.modules() if isinstance(module, CachingModule)]
    for index, owner in enumerate(owners):
        owner.cache_index = index
    return tuple(owner.cache_layout for owner in owners)
