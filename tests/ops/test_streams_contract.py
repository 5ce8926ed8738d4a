"""Every backend's hyper-connections, against the equations of the contract in float64, number by number."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.streams import StreamRule
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform
from tests.ops.test_attention_contract import randn

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
TOKENS, STREAMS, DIM = 4, 3, 10
RULE = StreamRule(norm_eps=0.1, eps=0.01, num_iterations=3)


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def ops_of(backend: str, dtype: torch.dtype) -> OpTable:
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_connected_streams(backend: str, dtype: torch.dtype) -> None:
    wide, num_outputs = torch.promote_types(dtype, torch.float32), (2 + STREAMS) * STREAMS
    streams = randn(TOKENS, STREAMS, DIM, seed=1).to(dtype)
    fn, scale, bias = (randn(*shape, seed=seed).to(wide) for seed, shape in enumerate(((15, 30), (3,), (15,)), 2))
    found = ops_of(backend, dtype).connect_streams(streams, fn, scale, bias, RULE)
    assert [part.dtype for part in found] == [dtype] * 3
    for token in range(TOKENS):
        z = project(streams[token].double(), fn.double()) * scale.double().repeat_interleave(
            torch.tensor([STREAMS, STREAMS, STREAMS * STREAMS])
        )
        z = z + bias.double()
        assert len(z) == num_outputs
        read, write = z[:STREAMS].sigmoid() + RULE.eps, 2 * z[STREAMS : 2 * STREAMS].sigmoid()
        mix = z[2 * STREAMS :].view(STREAMS, STREAMS).softmax(1) + RULE.eps
        for step in range(2 * RULE.num_iterations - 1):
            mix = mix / (mix.sum(step % 2, keepdim=True) + RULE.eps)
        for actual, expected in zip(found, (read @ streams[token].double(), write, mix)):
            torch.testing.assert_close(actual[token].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_joined_streams(backend: str, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    streams = randn(TOKENS, STREAMS, DIM, seed=1).to(dtype)
    fn, scale, bias = (randn(*shape, seed=seed).to(wide) for seed, shape in enumerate(((3, 30), (1,), (3,)), 2))
    found = ops_of(backend, dtype).join_streams(streams, fn, scale, bias, RULE)
    assert found.dtype == dtype
    for token in range(TOKENS):
        z = project(streams[token].double(), fn.double()) * scale.double() + bias.double()
        expected = (z.sigmoid() + RULE.eps) @ streams[token].double()
        torch.testing.assert_close(found[token].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def project(streams: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
    flat = streams.flatten()
    return fn @ flat / (flat.square().mean() + RULE.norm_eps).sqrt()
