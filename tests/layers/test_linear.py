"""Shards of a linear layer add up to the layer. Ranks are simulated: without a process group nothing is exchanged."""

import pytest
import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.linear import ColumnLinear, Output, RowLinear
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.parallel.sharding import WeightPart, even_span

NUM_RANKS = 2


def context_of(rank: int) -> LayerContext:
    groups = ProcessGroups(Group(rank=rank, size=NUM_RANKS, handle=None))
    return LayerContext(ops=torch_table("test"), groups=groups, dtype=torch.float64, device=torch.device("cpu"))


def checkpoint(names: list[str], num_out: int, num_in: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        tensors[f"{name}.weight"] = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64)
        tensors[f"{name}.bias"] = torch.randn(num_out, generator=generator, dtype=torch.float64)
    return tensors


def load(parts: dict[str, WeightPart], tensors: dict[str, torch.Tensor]) -> None:
    assert parts.keys() == tensors.keys()
    for name, part in parts.items():
        assert part.full_shape == tuple(tensors[name].shape)
        part.target.copy_(tensors[name][part.cut])


def test_fused_columns_of_all_ranks_are_the_projections() -> None:
    tensors = checkpoint(["gate", "up"], num_out=6, num_in=5)
    x = torch.randn(3, 5, dtype=torch.float64)
    shards = []
    for rank in range(NUM_RANKS):
        context = context_of(rank)
        span = even_span(6, context.groups.tensor, what="dims")
        outputs = [Output(name, 6, span) for name in ("gate", "up")]
        layer = ColumnLinear(context, num_in=5, outputs=outputs, has_bias=True)
        load(layer.weight_parts(), tensors)
        layer.finish_loading()
        shards.append(layer(x).chunk(2, dim=-1))
    for index, name in enumerate(("gate", "up")):
        joined = torch.cat([shard[index] for shard in shards], dim=-1)
        torch.testing.assert_close(joined, x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])


def test_rows_of_all_ranks_sum_to_the_projection_with_the_bias_once() -> None:
    tensors = checkpoint(["down"], num_out=4, num_in=6)
    x = torch.randn(3, 6, dtype=torch.float64)
    total = torch.zeros(3, 4, dtype=torch.float64)
    for rank in range(NUM_RANKS):
        context = context_of(rank)
        span = even_span(6, context.groups.tensor, what="dims")
        layer = RowLinear(context.at("down"), full_in=6, in_span=span, num_out=4, has_bias=True)
        load(layer.weight_parts(), tensors)
        layer.finish_loading()
        total += layer(x[:, span.start : span.start + span.length])
    torch.testing.assert_close(total, x @ tensors["down.weight"].T + tensors["down.bias"])


def test_weights_are_given_away_once() -> None:
    layer = RowLinear(
        context_of(0), full_in=6, in_span=even_span(6, Group(0, 1, None), what="dims"), num_out=4, has_bias=False
    )
    layer.finish_loading()
    with pytest.raises(RuntimeError, match="already"):
        layer.weight_parts()
