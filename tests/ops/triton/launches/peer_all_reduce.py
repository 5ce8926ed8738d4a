"""Sums over peer memory."""

import torch

from atom_cluster.parallel.peer_all_reduce import PeerAllReduce


def reduce(num_ranks: int, num_rows: int) -> None:
    memory = torch.empty(1024, dtype=torch.uint8)
    addresses = torch.zeros(num_ranks, dtype=torch.int64)
    peers = PeerAllReduce(rank=1, memory=memory, addresses=addresses, keep=None)
    peers.sum(torch.empty(num_rows, 4096, dtype=torch.bfloat16))


LAUNCHES = {"one row, 2 ranks": lambda: reduce(2, 1), "12 rows, 8 ranks": lambda: reduce(8, 12)}
