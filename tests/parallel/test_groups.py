"""A gang meets at rank 0's address, and nowhere else is listened."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import torch

from atom_cluster.errors import GangError
from atom_cluster.parallel.collectives import all_reduce_sum
from atom_cluster.parallel.groups import ProcessGroups
from tests.processes import run_ranks

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run_rank(rank: int, port: int, folder: str) -> None:
    groups = ProcessGroups.connect(
        rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}", device=CPU, timeout_s=60
    )
    total = all_reduce_sum(torch.ones(3), groups.tensor)
    torch.save({"sum": total.tolist(), "listens": listening_addresses()}, f"{folder}/{rank}.pt")
    all_reduce_sum(torch.ones(3), groups.tensor)  # so that nobody leaves before both have looked
    groups.close()


def listening_addresses() -> list[str]:
    """Of this process, as /proc has them: hexadecimal, zero for all interfaces."""
    sockets = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor that lists them
            sockets.add(os.readlink(path))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a Linux /proc")
def test_two_ranks_meet_and_listen_on_no_other_interface(tmp_path: Path) -> None:
    run_ranks(run_rank, free_port(), str(tmp_path), num_ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["sum"] == second["sum"] == [2.0] * 3
    assert first["listens"], "rank 0 listens at least for the meeting"
    assert all(int(address, 16) for address in first["listens"] + second["listens"])


def test_a_port_that_is_taken_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(GangError, match=f"rank 0 cannot listen on 127.0.0.1, port {port}"):
            ProcessGroups.connect(rank=0, world_size=2, init_method=f"tcp://127.0.0.1:{port}", device=CPU, timeout_s=5)
