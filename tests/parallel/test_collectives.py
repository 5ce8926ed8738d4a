"""Collectives between two processes, and within a group of one."""

from pathlib import Path

import torch

from atom_cluster.parallel.collectives import all_reduce_max, all_reduce_sum, gather_last_dim, smallest
from atom_cluster.parallel.groups import ProcessGroups
from tests.processes import run_ranks

CPU = torch.device("cpu")


def run_rank(rank: int, folder: str) -> None:
    groups = ProcessGroups.connect(
        rank=rank,
        world_size=2,
        init_method=f"file://{folder}/meeting",
        device=CPU,
        divides_experts=True,
        timeout_s=60,
    )
    group = groups.tensor
    mine = torch.full((2, 3), float(rank + 1))
    found = {
        "gathered": gather_last_dim(mine, group).tolist(),
        "sum": all_reduce_sum(mine.clone(), group).tolist(),
        "most": all_reduce_max(torch.tensor([rank, -rank]) << 40, group).tolist(),
        "smallest": smallest(5 - rank, group, CPU),
        "sum over experts": all_reduce_sum(mine.clone(), groups.expert).tolist(),
    }
    groups.close()
    groups.close()
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_ranks_agree(tmp_path: Path) -> None:
    run_ranks(run_rank, str(tmp_path), num_ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert found["sum"] == [[3.0] * 3] * 2
        assert found["gathered"] == [[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 2
        assert found["most"] == [1 << 40, 0]
        assert found["smallest"] == 4
        assert found["sum over experts"] == found["sum"]


def test_a_group_of_one_returns_what_it_is_given() -> None:
    group = ProcessGroups.single().tensor
    x = torch.ones(2, 3)
    assert all_reduce_sum(x, group) is x
    assert all_reduce_max(x, group) is x
    assert gather_last_dim(x, group) is x
    assert smallest(3, group, CPU) == 3
