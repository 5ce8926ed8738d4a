"""Ranks whose shares begin or end within quantization groups have the numbers that the checkpoint stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.experts import Experts, ExpertsSpec
from atom_cluster.layers.linear import ColumnLinear, Output, RowLinear
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.ops.quantized import QuantizedWeight, dequantize
from atom_cluster.ops.select import torch_table
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.parallel.sharding import Span, WeightParts, even_span
from atom_cluster.quantization.plan import read_plan
from tests.quantization.checkpoints import GPT_OSS_CONFIG
from tests.quantization.formats import FORMATS, mxfp4

SIZE, OTHER_SIZE = 96, 64
GROUPED = ["fp8_block", "ct_fp8_block", "ct_mxfp8", "ct_mxfp4", "ct_int4", "ct_int8_packed", "awq", "gptq"]
"""Groups of 32 inputs, of which 4 ranks have 24 each; blocks of 16 or 48 outputs."""
REORDERED = ["ct_int4_reordered", "gptq_reordered"]

Tensors = dict[str, torch.Tensor]


class Recorder:
    """Ops of the reference that keep what weights they were given."""

    def __init__(self) -> None:
        self.linear: list[QuantizedWeight] = []
        self.experts: list[tuple[QuantizedWeight, QuantizedWeight]] = []

    def table(self) -> OpTable:
        ops = torch_table("test")

        def prepare_linear(weight: QuantizedWeight, bias: torch.Tensor | None, *, dtype: torch.dtype) -> object:
            self.linear.append(weight)
            return ops.prepare_quantized_linear(weight, bias, dtype=dtype)

        def prepare_experts(gate_up: QuantizedWeight, down: QuantizedWeight, **rest: object) -> object:
            self.experts.append((gate_up, down))
            return ops.prepare_quantized_experts(gate_up, down, **rest)

        return replace(ops, prepare_quantized_linear=prepare_linear, prepare_quantized_experts=prepare_experts)


def context_of(rank: int, num_ranks: int, ops: OpTable, config: dict[str, object], stored: Tensors) -> LayerContext:
    return LayerContext(
        ops=ops,
        groups=ProcessGroups(Group(rank=rank, size=num_ranks, handle=None)),
        dtype=torch.float64,
        device=torch.device("cpu"),
        quantization=read_plan(HfConfig({"quantization_config": config})),
        name="mlp",
        stored_dtypes=dict.fromkeys(stored),
    )


def packed(form: str, name: str, num_out: int, num_in: int, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors, and the weight that they stand for."""
    weight = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensors, meant = FORMATS[form].pack(weight)
    tensors.pop("weight_shape", None)
    return {f"mlp.{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, meant


def load(parts: Mapping[str, WeightParts], tensors: Tensors) -> None:
    assert parts.keys() == tensors.keys()
    for name, targets in parts.items():
        for part in targets if isinstance(targets, tuple) else (targets,):
            assert part.full_shape == tuple(tensors[name].shape), name
            part.target.copy_(tensors[name][part.cut])


def numbers(weight: QuantizedWeight) -> torch.Tensor:
    return dequantize(weight, torch.float64)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("form", GROUPED + REORDERED)
def test_shares_of_inputs_are_exact(form: str, num_ranks: int) -> None:
    tensors, meant = packed(form, "down_proj", OTHER_SIZE, SIZE)
    x, total = torch.randn(5, SIZE, dtype=torch.float64), 0
    for rank in range(num_ranks):
        recorder = Recorder()
        context = context_of(rank, num_ranks, recorder.table(), FORMATS[form].config, tensors)
        span = even_span(SIZE, context.groups.tensor, what="dims")
        layer = RowLinear(context.at("down_proj"), full_in=SIZE, in_span=span, num_out=OTHER_SIZE)
        load(layer.weight_parts(), tensors)
        layer.finish_loading()
        assert torch.equal(numbers(recorder.linear[0]), meant[:, span.as_slice])
        total += layer(x[:, span.as_slice])
    round_inputs = FORMATS[form].round_inputs or (lambda x: x)
    expected = round_inputs(x) @ meant.T
    # Groups of rounded inputs begin at each rank's first.
    tolerance = 1e-12 if FORMATS[form].round_inputs is None else 0.04
    assert (total - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("form", GROUPED)
def test_shares_of_fused_outputs_are_exact(form: str, num_ranks: int) -> None:
    names = ("gate_proj", "up_proj")
    both = [packed(form, name, SIZE, OTHER_SIZE, seed) for seed, name in enumerate(names)]
    tensors = both[0][0] | both[1][0]
    for rank in range(num_ranks):
        recorder = Recorder()
        context = context_of(rank, num_ranks, recorder.table(), FORMATS[form].config, tensors)
        span = even_span(SIZE, context.groups.tensor, what="dims")
        layer = ColumnLinear(context, num_in=OTHER_SIZE, outputs=[Output(name, SIZE, span) for name in names])
        load(layer.weight_parts(), tensors)
        layer.finish_loading()
        expected = torch.cat([meant[span.as_slice] for _, meant in both])
        assert torch.equal(numbers(recorder.linear[0]), expected)


def test_outputs_that_are_regrouped_within_blocks_are_exact() -> None:
    tensors, meant = packed("fp8_block", "in_proj", SIZE, OTHER_SIZE)
    spans = [Span(start + kind, 2) for kind in (0, 2) for start in range(24, 72, 4)]
    recorder = Recorder()
    context = context_of(0, 1, recorder.table(), FORMATS["fp8_block"].config, tensors)
    layer = ColumnLinear(context, num_in=OTHER_SIZE, outputs=[Output("in_proj", SIZE, span) for span in spans])
    load(layer.weight_parts(), tensors)
    layer.finish_loading()
    assert torch.equal(numbers(recorder.linear[0]), torch.cat([meant[span.as_slice] for span in spans]))


def test_what_no_share_cuts_keeps_its_blocks() -> None:
    tensors, _ = packed("fp8_block", "down_proj", OTHER_SIZE, SIZE)
    recorder = Recorder()
    context = context_of(1, 3, recorder.table(), FORMATS["fp8_block"].config, tensors)
    span = even_span(SIZE, context.groups.tensor, what="dims")
    layer = RowLinear(context.at("down_proj"), full_in=SIZE, in_span=span, num_out=OTHER_SIZE)
    layer.finish_loading()
    assert recorder.linear[0].block == (48, 32)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("form", ["fp8_block", "ct_mxfp4", "awq"])
def test_shares_of_experts_are_exact(form: str, num_ranks: int) -> None:
    tensors: Tensors = {}
    meant: dict[str, list[torch.Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for expert in range(3):
        for seed, (name, found) in enumerate(meant.items()):
            sizes = (OTHER_SIZE, SIZE) if name == "down_proj" else (SIZE, OTHER_SIZE)
            stored, weight = packed(form, f"experts.{expert}.{name}", *sizes, seed=10 * expert + seed)
            tensors |= stored
            found.append(weight)
    gate, up, down = (torch.stack(found) for found in meant.values())
    spec = ExpertsSpec(num_experts=3, hidden_size=OTHER_SIZE, expert_size=SIZE)
    for rank in range(num_ranks):
        found, span = experts_of(rank, num_ranks, spec, FORMATS[form].config, tensors)
        expected = torch.cat([gate[:, span.as_slice], up[:, span.as_slice]], dim=1)
        assert torch.equal(numbers(found[0]), expected)
        assert torch.equal(numbers(found[1]), down[:, :, span.as_slice])


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_shares_of_stacked_mxfp4_experts_are_exact(num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    meant = {}
    for name, sizes in (("gate_up_proj", (2 * SIZE, OTHER_SIZE)), ("down_proj", (OTHER_SIZE, SIZE))):
        pairs = [mxfp4("blocks", "scales")(torch.randn(sizes, generator=generator).double()) for _ in range(3)]
        blocks = torch.stack([stored["blocks"] for stored, _ in pairs])
        tensors[f"mlp.experts.{name}_blocks"] = blocks.unflatten(-1, (-1, 16))
        tensors[f"mlp.experts.{name}_scales"] = torch.stack([stored["scales"] for stored, _ in pairs])
        meant[name] = torch.stack([weight for _, weight in pairs])
    spec = ExpertsSpec(num_experts=3, hidden_size=OTHER_SIZE, expert_size=SIZE, stacked_layout="interleaved")
    for rank in range(num_ranks):
        found, span = experts_of(rank, num_ranks, spec, GPT_OSS_CONFIG, tensors)
        gate, up = (meant["gate_up_proj"][:, kind::2][:, span.as_slice] for kind in (0, 1))
        assert torch.equal(numbers(found[0]), torch.cat([gate, up], dim=1))
        assert torch.equal(numbers(found[1]), meant["down_proj"][:, :, span.as_slice])


def experts_of(
    rank: int, num_ranks: int, spec: ExpertsSpec, config: Mapping[str, object], tensors: Tensors
) -> tuple[tuple[QuantizedWeight, QuantizedWeight], Span]:
    """A rank's two weights, and the intermediate dims that it has."""
    recorder = Recorder()
    context = context_of(rank, num_ranks, recorder.table(), dict(config), tensors)
    layer = Experts(context, spec)
    load(layer.weight_parts(), tensors)
    layer.finish_loading()
    return recorder.experts[0], even_span(spec.expert_size, context.groups.tensor, what="dims")


def test_what_is_packed_into_one_number_stays_together() -> None:
    context = context_of(1, 8, torch_table("test"), FORMATS["gptq"].config, {})
    span = even_span(SIZE, context.groups.tensor, what="dims")
    message = r"gptq packs 8 inputs together.* inputs 12 to 24 of 96: choose a smaller parallel\.tensor, .* of 8$"
    with pytest.raises(ConfigError, match=message):
        RowLinear(context.at("down_proj"), full_in=SIZE, in_span=span, num_out=OTHER_SIZE)
    with pytest.raises(ConfigError, match=r"outputs 12 to 24 of 96.* or parallel\.expert, which leaves experts whole"):
        Experts(context, ExpertsSpec(num_experts=2, hidden_size=OTHER_SIZE, expert_size=SIZE))
