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


CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE] + [("triton", torch.float32)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def test_connected_streams(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    wide, num_outputs = torch.promote_types(dtype, torch.float32), (2 + STREAMS) * STREAMS
    streams = randn(TOKENS, STREAMS, DIM, seed=1).to(dtype)
    fn, scale, bias = (randn(*shape, seed=seed).to(wide) for seed, shape in enumerate(((15, 30), (3,), (15,)), 2))
    found = ops.connect_streams(streams, fn, scale, bias, RULE)
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


def test_joined_streams(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    wide = torch.promote_types(dtype, torch.float32)
    streams = randn(TOKENS, STREAMS, DIM, seed=1).to(dtype)
    fn, scale, bias = (randn(*shape, seed=seed).to(wide) for seed, shape in enumerate(((3, 30), (1,), (3,)), 2))
    found = ops.join_streams(streams, fn, scale, bias, RULE)
    assert found.dtype == dtype
    for token in range(TOKENS):
        z = project(streams[token].double(), fn.double()) * scale.double() + bias.double()
        expected = (z.sigmoid() + RULE.eps) @ streams[token].double()
        torch.testing.assert_close(found[token].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_streams_behind_a_block(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    shapes = ((TOKENS, STREAMS, DIM), (TOKENS, DIM), (TOKENS, STREAMS), (TOKENS, STREAMS, STREAMS))
    streams, output, write, mix = (randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    found = ops.write_streams(streams, output, write, mix)
    assert found.dtype == dtype and found.shape == streams.shape
    for token in range(TOKENS):
        mixed = mix[token].double().T @ streams[token].double()
        expected = torch.outer(write[token].double(), output[token].double()) + mixed
        torch.testing.assert_close(found[token].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def project(streams: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
    flat = streams.flatten()
    return fn @ flat / (flat.square().mean() + RULE.norm_eps).sqrt()
