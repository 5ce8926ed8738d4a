"""Which ranks read each other's memory. That their sums are right is tested on GPUs (test_peer_all_reduce_gpu.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from atom_cluster.parallel.peer_all_reduce import open_peer_all_reduce
from tests.processes import run_ranks

CPU = torch.device("cpu")


class SymmetricMemory:
    """Of one rank, on a CPU; in place of torch's."""

    def __init__(self, rank: int, *, cannot: tuple[str, int] | None) -> None:
        self._rank = rank
        self._cannot = cannot
        self.num_rendezvous = 0

    def empty(self, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._check("empty")
        return torch.empty(num_bytes, dtype=dtype, device=device)

    def rendezvous(self, memory: torch.Tensor, group: dist.ProcessGroup) -> Any:
        self._check("rendezvous")
        self.num_rendezvous += 1
        return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * dist.get_world_size(group))

    def _check(self, name: str) -> None:
        if self._cannot == (name, self._rank):
            raise RuntimeError(f"no {name} here")


def open_in_gangs(rank: int, folder: str, cannot: tuple[str, int] | None, sizes: tuple[int, ...]) -> None:
    """In gangs of these sizes, one after the other; saves whether it may read peers, why, and how often it met them."""
    found = []
    for number, size in enumerate(sizes):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{number}", rank=rank, world_size=size)
        assert dist.group.WORLD is not None
        symmetric = SymmetricMemory(rank, cannot=cannot)
        with (
            mock.patch("torch.distributed._symmetric_memory.empty", symmetric.empty),
            mock.patch("torch.distributed._symmetric_memory.rendezvous", symmetric.rendezvous),
            mock.patch("torch.cuda.synchronize"),
        ):
            peers, reason = open_peer_all_reduce(dist.group.WORLD, CPU)
        found.append((peers is not None, reason, symmetric.num_rendezvous))
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def found_by_ranks(tmp_path: Path, sizes: tuple[int, ...], *, cannot: tuple[str, int] | None = None) -> list[Any]:
    run_ranks(open_in_gangs, str(tmp_path), cannot, sizes, num_ranks=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def test_a_process_shares_its_memory_with_one_gang(tmp_path: Path) -> None:
    for first, second in found_by_ranks(tmp_path, (2, 2)):
        assert first[0] and "peer memory" in first[1]
        assert not second[0] and "gang before" in second[1]
        assert second[2] == 0, "it would wait forever"


def test_a_new_process_does_not_wait_for_one_that_was_in_a_gang(tmp_path: Path) -> None:
    (_, found), (found_by_new,) = found_by_ranks(tmp_path, (1, 2))
    assert found == found_by_new
    assert not found[0] and "gang before" in found[1] and found[2] == 0


@pytest.mark.parametrize(("what", "reason"), [("empty", "another rank has no memory"), ("rendezvous", "cannot map")])
def test_all_ranks_do_without_what_one_cannot(tmp_path: Path, what: str, reason: str) -> None:
    (first,), (other,) = found_by_ranks(tmp_path, (2,), cannot=(what, 1))
    assert not first[0] and reason in first[1]
    assert not other[0] and other[1] == f"RuntimeError: no {what} here"
