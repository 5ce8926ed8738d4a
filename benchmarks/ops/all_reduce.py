"""Sums over the GPUs of one host: through peer memory and through the collective library, in replayed graphs.

    python -m benchmarks.ops.all_reduce --ranks 2

Microseconds per call, of 50 calls in one graph: what a decode step pays. Rows are of 4096 bfloat16 values.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing

from atom_cluster.parallel.groups import ProcessGroups

NUM_ROWS = [1, 2, 4, 8, 16, 32, 56, 64, 96, 128, 256]
CALLS_PER_GRAPH = 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = torch.multiprocessing.get_context("spawn").SimpleQueue()
        spawn = torch.multiprocessing.spawn
        spawn(run_rank, args=(args.ranks, f"file://{directory}/meeting", rows), nprocs=args.ranks)
        found = rows.get()
    print(f"{'rows':>6}{'KiB':>8}{'peers us':>10}{'library us':>12}")
    for row in found:
        peers_us = row["peers_us"] or float("nan")
        print(f"{row['rows']:6d}{row['bytes'] / 1024:8.0f}{peers_us:10.1f}{row['library_us']:12.1f}")


def run_rank(rank: int, num_ranks: int, meeting: str, rows: object) -> None:
    """One rank's process."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = ProcessGroups.connect(rank=rank, world_size=num_ranks, init_method=meeting, device=device)
    peers = groups.tensor.peers
    if rank == 0:
        print(groups.choice)
    found = []
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, 4096, device=device).bfloat16()
        peers_us = None if peers is None or not peers.takes(x) else microseconds(peers.sum, x)
        library_us = microseconds(dist.all_reduce, x)
        found.append({"rows": num_rows, "bytes": x.numel() * 2, "peers_us": peers_us, "library_us": library_us})
    if rank == 0:
        rows.put(found)  # type: ignore[attr-defined]
    groups.close()


def microseconds(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Of one call in a graph of many; the best of several replays."""
    for _ in range(3):
        call(x)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call(x)
    graph.replay()
    best = float("inf")
    for _ in range(10):
        dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / CALLS_PER_GRAPH)
    return best


if __name__ == "__main__":
    main()
