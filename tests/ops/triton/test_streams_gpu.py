"""Hyper-connections on a GPU with the dims of real models, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.ops import torch_ref as ref
from atom_cluster.ops.streams import StreamRule
from tests.ops.triton.test_norm_gpu import poisoned_memory, randn

__all__ = ["poisoned_memory"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

ERROR = {torch.bfloat16: 5e-3, torch.float16: 8e-4, torch.float32: 2e-6}
RULE = StreamRule(norm_eps=1e-6, eps=1e-6, num_iterations=20)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 7168), (33, 4, 4096), (3, 3, 100), (2000, 4, 2048), (0, 4, 64)], ids=str)
def test_streams(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from atom_cluster.ops import triton as kernels

    torch.manual_seed(0)
    num, size = shape[1:]
    streams = randn(*shape, dtype=dtype) * 5
    fn = randn((2 + num) * num, num * size, dtype=torch.float32) / (num * size) ** 0.5
    scale, bias = randn(3, dtype=torch.float32), randn((2 + num) * num, dtype=torch.float32)
    wide = [tensor.double() for tensor in (streams, fn, scale, bias)]
    found = kernels.connect_streams(streams, fn, scale, bias, RULE)
    for actual, wanted in zip(found, ref.connect_streams(*wide, RULE)):
        assert_near(actual, wanted, dtype)
    output = randn(shape[0], size, dtype=dtype)
    wanted = ref.write_streams(wide[0], output.double(), found[1].double(), found[2].double())
    assert_near(kernels.write_streams(streams, output, *found[1:]), wanted, dtype)
    joined = kernels.join_streams(streams, fn[:num], scale[:1], bias[:num], RULE)
    assert_near(joined, ref.join_streams(wide[0], wide[1][:num], wide[2][:1], wide[3][:num], RULE), dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape
    assert float((found.double() - wanted).norm()) <= ERROR[dtype] * float(wanted.norm())
