"""When weights are packed into half precision, and that it changes nothing."""

import pytest
import torch

from atom_cluster.ops.cpu import linear
from atom_cluster.ops.cpu.linear import can_pack, is_held_by_half, prepare_linear

needs_packing = pytest.mark.skipif(not can_pack(), reason="this build of torch has no FBGEMM")


def weights(num_out: int = 300, num_in: int = 200) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(0)) * 0.02


@needs_packing
def test_bfloat16_weights_are_packed_and_give_float32_results() -> None:
    weight = weights().bfloat16()
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    op = prepare_linear(weight, None, dtype=torch.float32)
    exact = x.double() @ weight.double().T
    plain_error = (x @ weight.float().T - exact).abs().max()
    assert op.name == "packed float16"
    assert (op(x) - exact).abs().max() <= 2 * plain_error + 1e-7


def test_weights_that_half_precision_would_round_are_kept() -> None:
    assert prepare_linear(weights(), None, dtype=torch.float32).name == "float32"
    assert prepare_linear(weights().bfloat16(), None, dtype=torch.bfloat16).name == "bfloat16"


def test_without_fbgemm_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda: False)
    assert prepare_linear(weights().bfloat16(), None, dtype=torch.float32).name == "float32"


@pytest.mark.parametrize(
    ("value", "is_held"), [(2.0**-17 * 1.5, True), (2.0**-30, True), (65280.0, True), (65536.0, False), (0.1, False)]
)
def test_half_holds_what_fits_its_range_and_steps(value: float, is_held: bool) -> None:
    weight = torch.zeros(5000, 2)
    weight[4999, 1] = value
    assert is_held_by_half(weight) is is_held


def test_infinite_weights_are_not_packed() -> None:
    assert not is_held_by_half(torch.tensor([[float("nan"), 0.0]]))
