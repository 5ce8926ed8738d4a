"""Hyper-connections: the residual of several streams around a block. Replicated on every rank. Knows no blocks.

`ops/streams.py` has the equations. Shape suffixes: T tokens, N streams, D hidden dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.ops.streams import StreamRule
from atom_cluster.parallel.sharding import WeightParts, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnectionSpec(StreamRule):
    """The rule, and sizes."""

    hidden_size: int
    num_streams: int


class _Streams(Module):
    """A projection of all streams of a token, with factors and biases. Its tensors are `<name>_fn` and so on."""

    def __init__(self, context: LayerContext, spec: HyperConnectionSpec, *, num_outputs: int, num_scales: int) -> None:
        wide = torch.promote_types(context.dtype, torch.float32)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=wide, device=context.device)

        self._fn_JI = empty(num_outputs, spec.num_streams * spec.hidden_size)
        self._scale = empty(num_scales)
        self._bias_J = empty(num_outputs)
        self._name = context.name
        self._ops = context.ops
        self._spec = spec

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        tensors = {"fn": self._fn_JI, "scale": self._scale, "base": self._bias_J}
        return {f"{self._name}_{suffix}": whole(tensor) for suffix, tensor in tensors.items()}


class HyperConnection(_Streams):
    """Before and behind one block."""

    def __init__(self, context: LayerContext, spec: HyperConnectionSpec) -> None:
        num = spec.num_streams
        super().__init__(context, spec, num_outputs=(2 + num) * num, num_scales=3)

    def read(self, streams_TND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(block input [T, D], w_TN, mix_TNN)"""
        return self._ops.connect_streams(streams_TND, self._fn_JI, self._scale, self._bias_J, self._spec)

    def write(
        self, streams_TND: torch.Tensor, output_TD: torch.Tensor, write_TN: torch.Tensor, mix_TNN: torch.Tensor
    ) -> torch.Tensor:
        """The streams behind a block, of its output and of what `read` returned; [T, N, D]."""
        return self._ops.write_streams(streams_TND, output_TD, write_TN, mix_TNN)


class JoinedStreams(_Streams):
    """Behind the last block: one vector per token."""

    def __init__(self, context: LayerContext, spec: HyperConnectionSpec) -> None:
        super().__init__(context, spec, num_outputs=spec.num_streams, num_scales=1)

    def __call__(self, streams_TND: torch.Tensor) -> torch.Tensor:
        """[T, N, D] -> [T, D]"""
        return self._ops.join_streams(streams_TND, self._fn_JI, self._scale, self._bias_J, self._spec)
