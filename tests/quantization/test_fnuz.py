"""Float8 checkpoints on hardware whose float8 has no minus zero (gfx942) and half the range."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom_cluster.models.registry import load_model
from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.ops.select import float8_dtype_of, torch_table
from atom_cluster.ops.torch_ref import prepare_quantized_linear
from atom_cluster.platform.detect import Platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write_pair
from tests.quantization.formats import FORMATS
from tests.tiny_models import random_tokens


def logits(directory: Path, float8_dtype: torch.dtype) -> tuple[torch.Tensor, set[torch.dtype]]:
    """And the dtypes of weights that the ops were given."""
    dtypes = set()

    def prepare(weight: QuantizedWeight, bias: torch.Tensor | None, *, dtype: torch.dtype) -> object:
        dtypes.add(weight.codes.dtype)
        return prepare_quantized_linear(weight, bias, dtype=dtype)

    ops = replace(torch_table("test"), float8_dtype=float8_dtype, prepare_quantized_linear=prepare)
    model = load_model(directory, context=make_context(ops, dtype=torch.float64), max_model_len=64)
    return PagedDriver(model).step([(0, random_tokens(30))])[0], dtypes


@pytest.mark.parametrize(
    ("form", "tolerance"),
    # Where scales are fixed or powers of two, numbers are the same; else inputs are rounded on a shifted grid.
    [("ct_fp8_static", 1e-6), ("ct_mxfp8", 1e-6), ("fp8_block", 0.25), ("ct_fp8_channel", 0.25)],
)
def test_converted_weights_compute_the_same(form: str, tolerance: float, tmp_path: Path) -> None:
    directory, _ = write_pair("llama", FORMATS[form], tmp_path)
    found, dtypes = logits(directory, torch.float8_e4m3fnuz)
    assert dtypes == {torch.float8_e4m3fnuz}
    expected, _ = logits(directory, torch.float8_e4m3fn)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("vendor", "arch", "dtype"),
    [
        ("rocm", "gfx942", torch.float8_e4m3fnuz),
        ("rocm", "gfx950", torch.float8_e4m3fn),
        ("cuda", "sm_90", torch.float8_e4m3fn),
    ],
)
def test_the_architecture_decides(vendor: str, arch: str, dtype: torch.dtype) -> None:
    assert float8_dtype_of(Platform(vendor=vendor, arch=arch, num_devices=1)) == dtype
