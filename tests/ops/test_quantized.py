"""Every backend multiplies quantized weights as the contract says; what they mean is written out here."""

import pytest
import torch
import torch.nn.functional as F

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight, dequantize
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.ops.torch_ref import quantized as reference
from atom_cluster.ops.torch_ref.quantized_moe import QuantizedExperts
from atom_cluster.platform.detect import detect_platform

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE] + [("triton", torch.float32)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def random_weight(*stack: int, num_out: int, num_in: int, rows: int = 7, columns: int = 5) -> QuantizedWeight:
    """int8 in blocks that do not divide it, with zero points."""
    generator = torch.Generator().manual_seed(num_out)
    blocks = (*stack, -(-num_out // rows), -(-num_in // columns))
    return QuantizedWeight(
        number="int8",
        codes=torch.randint(-128, 128, (*stack, num_out, num_in), generator=generator, dtype=torch.int8),
        scale=torch.rand(blocks, generator=generator) * 0.01,
        block=(rows, columns),
        zero=torch.randint(-100, 100, blocks, generator=generator, dtype=torch.int16),
    )


def numbers_of(weight: QuantizedWeight) -> torch.Tensor:
    """Element by element."""
    rows, columns = weight.block
    result = torch.empty(weight.codes.shape, dtype=torch.float64)
    assert weight.zero is not None
    for row in range(result.shape[-2]):
        for column in range(result.shape[-1]):
            block = (..., row // rows, column // columns)
            code = weight.codes[..., row, column].double()
            result[..., row, column] = (code - weight.zero[block]) * weight.scale[block].double()
    return result


@pytest.mark.parametrize("tile_elements", [1, 100, 1 << 22])
def test_blocks_are_found_from_any_tile_of_outputs(
    case: tuple[OpTable, torch.dtype], tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, dtype = case
    monkeypatch.setattr(reference, "TILE_ELEMENTS", tile_elements)
    weight = random_weight(num_out=23, num_in=18)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(5, 18, generator=generator).to(dtype), torch.randn(23, generator=generator).to(dtype)
    before = x.clone()
    found = ops.prepare_quantized_linear(weight, bias, dtype=dtype)(x)
    expected = x.double() @ numbers_of(weight).T + bias.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(x, before)


def test_groups_of_inputs_may_be_scattered() -> None:
    index = torch.randperm(20, generator=torch.Generator().manual_seed(0)) // 5
    weight = random_weight(num_out=3, num_in=20, rows=1)
    scattered = QuantizedWeight(
        number="int8", codes=weight.codes, scale=weight.scale, block=(1, 5), zero=weight.zero, input_group=index
    )
    assert weight.zero is not None
    expected = (weight.codes.double() - weight.zero[:, index]) * weight.scale.double()[:, index]
    assert torch.equal(dequantize(scattered, torch.float64), expected)


def test_inputs_beyond_the_bound_saturate() -> None:
    weight = QuantizedWeight(
        number="float8",
        codes=torch.eye(4).to(torch.float8_e4m3fn),
        scale=torch.ones(4, 1),
        block=(1, 4),
        inputs=InputQuantization(number="float8", max_abs=2.0),
    )
    x = torch.tensor([[8.0, 1.0, -0.5, 0.0]])
    assert reference.round_inputs(x, weight).tolist() == [[2.0, 1.0, -0.5, 0.0]]


def test_tokens_without_any_size_stay_zero() -> None:
    for group_size in (None, 2):
        weight = QuantizedWeight(
            number="int8",
            codes=torch.ones(4, 4, dtype=torch.int8),
            scale=torch.ones(4, 1),
            block=(1, 4),
            inputs=InputQuantization(number="int8", group_size=group_size),
        )
        assert reference.round_inputs(torch.zeros(2, 4), weight).abs().max() == 0


def test_experts_are_weighted_and_those_elsewhere_left_out(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    gate_up, down = random_weight(3, num_out=16, num_in=12), random_weight(3, num_out=12, num_in=8)
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(4, 12, generator=generator) * 0.2).to(dtype)
    biases = [torch.randn(3, size, generator=generator).to(dtype) for size in (16, 12)]
    expert = torch.tensor([[0, 2], [3, 1], [1, 0], [3, 3]])
    share = torch.rand(4, 2, generator=generator)
    op = ops.prepare_quantized_experts(
        gate_up, down, gate_up_bias=biases[0], down_bias=biases[1], activation=ExpertActivation(), dtype=dtype
    )
    expected = torch.zeros(4, 12, dtype=torch.float64)
    for token in range(4):
        for index, weight in zip(expert[token].tolist(), share[token].double()):
            if index == 3:
                continue
            gate, up = (numbers_of(gate_up)[index] @ x[token].double() + biases[0][index].double()).chunk(2)
            out = numbers_of(down)[index] @ (F.silu(gate) * up) + biases[1][index].double()
            expected[token] += weight * out
    found = op(x, expert, share)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_graphs_get_what_tokens_get_expert_by_expert() -> None:
    gate_up, down = random_weight(3, num_out=16, num_in=12), random_weight(3, num_out=12, num_in=8)
    op = QuantizedExperts(gate_up, down, (None, None), ExpertActivation(), torch.float32)
    generator = torch.Generator().manual_seed(3)
    x, addend = (torch.randn(4, 12, generator=generator) for _ in range(2))
    expert, share = torch.tensor([[0, 2], [3, 1], [1, 0], [3, 3]]), torch.rand(4, 2, generator=generator)
    found = op.every_expert(x, expert, share, addend.clone())
    torch.testing.assert_close(found, op(x, expert, share, addend_TD=addend))
