"""Ranks' shares of a mixture of experts add up to it, however a checkpoint arranges it. Ranks are simulated."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.experts import Experts
from atom_cluster.layers.moe import MoeSpec, SparseMoe
from atom_cluster.layers.router import RouterSpec
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.parallel.sharding import WeightParts

NUM_EXPERTS, SIZE, EXPERT_SIZE, SHARED_SIZE = 6, 10, 8, 12
SPEC = MoeSpec(
    num_experts=NUM_EXPERTS,
    hidden_size=SIZE,
    expert_size=EXPERT_SIZE,
    router=RouterSpec(experts_per_token=3, renormalize=True),
    shared_size=SHARED_SIZE,
    shared_gate_name="shared_gate",
)
WITH_BIASES = replace(SPEC, has_bias=True)


def context_of(rank: int, num_ranks: int, *, divides_experts: bool, stored_names: frozenset[str]) -> LayerContext:
    group = Group(rank=rank, size=num_ranks, handle=None)
    return LayerContext(
        ops=torch_table("test"),
        groups=ProcessGroups(group, group if divides_experts else None),
        dtype=torch.float64,
        device=torch.device("cpu"),
        name="mlp",
        stored_dtypes=dict.fromkeys(stored_names, torch.float64),
    )


def checkpoint() -> dict[str, torch.Tensor]:
    """A block with experts that have tensors of their own."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (EXPERT_SIZE, SIZE), "up_proj": (EXPERT_SIZE, SIZE), "down_proj": (SIZE, EXPERT_SIZE)}
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (NUM_EXPERTS, SIZE), "shared_gate.weight": (1, SIZE)}
    for name, (num_out, num_in) in sizes.items():
        wide = {EXPERT_SIZE: SHARED_SIZE}
        shapes[f"shared_experts.{name}.weight"] = (wide.get(num_out, num_out), wide.get(num_in, num_in))
        for expert in range(NUM_EXPERTS):
            shapes[f"experts.{expert}.{name}.weight"] = (num_out, num_in)
            shapes[f"experts.{expert}.{name}.bias"] = (num_out,)
    return {
        f"mlp.{name}": torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def stacked(tensors: dict[str, torch.Tensor], *, is_interleaved: bool) -> dict[str, torch.Tensor]:
    """The same with all experts in one tensor."""

    def stack(kind: str, suffix: str) -> torch.Tensor:
        return torch.stack([tensors[f"mlp.experts.{expert}.{kind}_proj.{suffix}"] for expert in range(NUM_EXPERTS)])

    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for suffix, ending in (("weight", ""), ("bias", "_bias")):
        both = [stack("gate", suffix), stack("up", suffix)]
        gate_up = torch.stack(both, dim=2).flatten(1, 2) if is_interleaved else torch.cat(both, dim=1)
        down = stack("down", suffix)
        if is_interleaved and suffix == "weight":
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        found |= {f"mlp.experts.gate_up_proj{ending}": gate_up, f"mlp.experts.down_proj{ending}": down}
    return found


def load(parts: Mapping[str, WeightParts], tensors: dict[str, torch.Tensor]) -> None:
    assert parts.keys() == tensors.keys()
    for name, targets in parts.items():
        for part in targets if isinstance(targets, tuple) else (targets,):
            assert part.full_shape == tuple(tensors[name].shape)
            source = tensors[name][part.cut]
            part.target.copy_(source.transpose(-2, -1) if part.is_transposed else source)


def total_of_ranks(
    spec: MoeSpec, tensors: dict[str, torch.Tensor], x: torch.Tensor, num_ranks: int, *, divides_experts: bool = False
) -> torch.Tensor:
    total = torch.zeros_like(x)
    for rank in range(num_ranks):
        names = frozenset(tensors)
        layer = SparseMoe(context_of(rank, num_ranks, divides_experts=divides_experts, stored_names=names), spec)
        load(layer.weight_parts(), tensors)
        layer.finish_loading()
        total += layer(x)
    return total


@pytest.mark.parametrize("divides_experts", [False, True])
@pytest.mark.parametrize("form", ["single", "concatenated", "interleaved"])
def test_shares_add_up_in_every_form(form: str, divides_experts: bool) -> None:
    tensors, x = checkpoint(), torch.randn(7, SIZE, dtype=torch.float64)
    expected = total_of_ranks(WITH_BIASES, tensors, x, 1)
    spec = WITH_BIASES
    if form != "single":
        tensors = stacked(tensors, is_interleaved=form == "interleaved")
        spec = replace(spec, stacked_layout=form)
    torch.testing.assert_close(total_of_ranks(spec, tensors, x, 2, divides_experts=divides_experts), expected)


def test_a_rank_that_has_whole_experts_has_no_other() -> None:
    context = context_of(1, 2, divides_experts=True, stored_names=frozenset())
    parts = Experts(context, SPEC).weight_parts()
    shapes = {name: tuple(part.target.shape) for name, part in parts.items() if name.endswith("gate_proj.weight")}
    assert list(shapes.values()) == [(0, SIZE)] * 3 + [(EXPERT_SIZE, SIZE)] * 3


def test_experts_and_their_dims_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert = 4 does not divide the model's 6 experts"):
        SparseMoe(context_of(0, 4, divides_experts=True, stored_names=frozenset()), SPEC)
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 3 .* intermediate dims of an expert"):
        SparseMoe(context_of(0, 3, divides_experts=False, stored_names=frozenset()), SPEC)


def test_weights_are_given_away_once() -> None:
    layer = Experts(context_of(0, 1, divides_experts=False, stored_names=frozenset()), SPEC)
    layer.finish_loading()
    assert [op.name for op in layer.linear_ops()] == ["float64 x 6 experts"]
    with pytest.raises(RuntimeError, match="already"):
        layer.weight_parts()
