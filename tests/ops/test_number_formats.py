"""Codes of eight and four bits mean what their definitions say."""

import torch

from atom_cluster.ops.number_formats import (
    e8m0_codes,
    e8m0_values,
    float4_codes,
    float4_values,
    float8_to_fnuz,
    pack_nibbles,
    scale_for,
    to_float8,
    unpack_nibbles,
)


def test_float4_rounds_to_the_nearest_and_ties_to_even() -> None:
    x = torch.tensor([0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 100.0, -0.3, -5.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -0.5, -4.0])
    assert torch.equal(float4_values(float4_codes(x), torch.float32), expected)
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(float4_codes(float4_values(codes, torch.float32)), codes)


def test_the_lower_index_is_in_the_lower_bits() -> None:
    assert unpack_nibbles(torch.tensor([0x21, 0x43], dtype=torch.uint8)).tolist() == [1, 2, 3, 4]
    assert pack_nibbles(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [0x21, 0x43]


def test_e8m0_is_a_biased_exponent() -> None:
    codes = torch.tensor([1, 126, 127, 128, 254], dtype=torch.uint8)
    values = e8m0_values(codes, torch.float64)
    assert values.tolist() == [2.0**-126, 0.5, 1.0, 2.0, 2.0**127]
    assert torch.equal(e8m0_codes(values), codes)


def test_scales_bring_the_largest_to_the_limit_and_leave_zeros_alone() -> None:
    max_abs = torch.tensor([0.0, 448.0, 449.0, 896.0, 7.0, 1.5])
    assert scale_for(max_abs[:2], 448.0).tolist() == [1.0, 1.0]
    assert scale_for(max_abs, 448.0, "e8m0").tolist() == [1.0, 1.0, 2.0, 2.0, 2.0**-6, 2.0**-8]
    # A largest float4 number of 6: up to 7 is rounded down to it.
    assert scale_for(torch.tensor([6.0, 7.0, 7.1]), 6.0, "e8m0").tolist() == [1.0, 1.0, 2.0]


def test_float8_saturates() -> None:
    found = to_float8(torch.tensor([1e6, -1e6, 448.0]), torch.float8_e4m3fn)
    assert found.float().tolist() == [448.0, -448.0, 448.0]


def test_every_float8_number_has_a_twin_on_hardware_without_minus_zero() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    twins, scale = float8_to_fnuz(codes, torch.tensor(0.25))
    assert twins.dtype == torch.float8_e4m3fnuz and float(scale) == 0.5
    assert torch.equal(twins.float() * scale, codes.float() * 0.25 + 0.0)
