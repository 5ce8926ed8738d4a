"""Sums over peer memory are those of the library, also in graphs and in calls of any sizes one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from atom_cluster.parallel.groups import ProcessGroups

NUM_DEVICES = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(NUM_DEVICES < 2, reason="torch sees fewer than two devices"),
]
SIZES = [8, 4096, 4096 * 3, 1024 * 17, 30_000, 8, 16 * 2048, 24]


def run_rank(rank: int, num_ranks: int, meeting: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = ProcessGroups.connect(rank=rank, world_size=num_ranks, init_method=meeting, device=device)
    peers = groups.tensor.peers
    assert peers is not None, groups.choice
    generator = torch.Generator(device).manual_seed(rank)

    def fresh(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def expected_sum(x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        dist.all_reduce(wide)
        return wide

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        for _ in range(20):
            inputs = [fresh(size, dtype) for size in SIZES]
            found = [peers.sum(x) for x in inputs]
            for x, y in zip(inputs, found):
                torch.testing.assert_close(y.double(), expected_sum(x), rtol=tolerance, atol=tolerance)
                everybodys = [torch.empty_like(y) for _ in range(num_ranks)]
                dist.all_gather(everybodys, y)
                assert all(torch.equal(y, other) for other in everybodys), "ranks must go on with the same numbers"
    graphs = []
    for num_calls in (3, 4):
        x = fresh(4096, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for _ in range(num_calls):
                y = peers.sum(y)
        graphs.append((graph, x, y, num_ranks ** (num_calls - 1)))
    for turn in range(200):
        graph, x, y, factor = graphs[turn % 2]
        x.copy_(fresh(4096, torch.bfloat16))
        graph.replay()
        if turn % 3 == 0:
            peers.sum(x)
        torch.testing.assert_close(y.double(), expected_sum(x) * factor, rtol=3e-2, atol=3e-2 * factor)
    assert not peers.takes(torch.empty(4_000_000, device=device))
    assert not peers.takes(torch.empty(5, device=device))
    torch.cuda.synchronize()
    groups.close()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sums_are_those_of_the_library(num_ranks: int, tmp_path: Path) -> None:
    if num_ranks > NUM_DEVICES:
        pytest.skip(f"torch sees {NUM_DEVICES} devices")
    torch.multiprocessing.spawn(run_rank, args=(num_ranks, f"file://{tmp_path}/meeting"), nprocs=num_ranks)
