"""Sums of small messages over the ranks of one host, read straight from each other's memory (NVLink, XGMI).

A collective library's all-reduce takes tens of microseconds whatever the size, and a decode step has two per layer.
Here each rank copies its addend to memory that all can read, says so to every other rank, waits until they all have,
and adds what it reads, in the order of ranks: so all get the same sum, bit for bit. Nothing tells a rank that others
have read its addend; instead two copies take turns, and who has seen everyone arrive at a call knows that everyone has
left the one before. Each block of threads does all that for a region of its own, with a count of its own, so calls of
different sizes and replayed graphs may follow each other in any order, as long as it is the same order on all ranks.

Messages that are large are left to the library, which divides the work. Knows no layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from atom_cluster.platform.store_barrier import barrier_behind_stores
from atom_cluster.units import KiB, ceil_div

_NUM_BLOCKS = 48
_REGION_BYTES = 16 * KiB
"""Of one block of threads, in each of the two copies."""
_ALIGNMENT_BYTES = 16
_FLAG_BYTES = 4
_NOT_TO_BE_HAD = (ImportError, RuntimeError, AttributeError, TypeError, ValueError)
"""What torch raises, in one version or another, where ranks cannot read each other's memory."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is where in the memory that ranks share, in bytes from its start: flags [blocks, ranks], then two copies."""

    num_ranks: int

    @property
    def data_start(self) -> int:
        """Behind the flags, which say how often each rank has arrived at each block."""
        return ceil_div(_NUM_BLOCKS * self.num_ranks * _FLAG_BYTES, 128) * 128

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.data_start + 2 * _NUM_BLOCKS * _REGION_BYTES


class PeerAllReduce:
    """One rank's part. Made by `open_peer_all_reduce`; keeps the shared memory alive."""

    def __init__(self, *, rank: int, memory: torch.Tensor, addresses: torch.Tensor, keep: object) -> None:
        """memory: this rank's; addresses: [ranks] int64 on the device, of every rank's memory as seen from here."""
        self._rank = rank
        self._num_ranks = addresses.shape[0]
        self._layout = _Layout(self._num_ranks)
        self._memory = memory
        self._addresses = addresses
        self._keep = keep
        self._counts = torch.zeros(_NUM_BLOCKS, dtype=torch.int32, device=memory.device)

    @property
    def max_bytes(self) -> int:
        """Of what is worth summing this way: each rank reads what all others have, where the library divides that."""
        return _NUM_BLOCKS * _REGION_BYTES // self._num_ranks

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `sum` is for this tensor: whole 16-byte words, and not too many."""
        num_bytes = x.numel() * x.element_size()
        is_small = 0 < num_bytes <= self.max_bytes and num_bytes % _ALIGNMENT_BYTES == 0
        return is_small and x.is_contiguous() and x.dtype in (torch.bfloat16, torch.float16, torch.float32)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of the ranks' `x` in float32, rounded to its dtype; new memory, the same on every rank.

        Raises ValueError for what it does not take.
        """
        if not self.takes(x):
            raise ValueError(f"a {x.dtype} tensor of shape {tuple(x.shape)} is not for sums over peer memory")
        out = torch.empty_like(x)
        num_items, region = x.numel(), _REGION_BYTES // x.element_size()
        # A block's part is as small as possible, so that many take part, but a whole number of words.
        unit = _ALIGNMENT_BYTES // x.element_size()
        per_block = min(region, max(512, triton.next_power_of_2(ceil_div(num_items, _NUM_BLOCKS * unit) * unit)))
        _sum_kernel[(ceil_div(num_items, per_block),)](
            x,
            out,
            num_items,
            self._addresses,
            self._counts,
            RANK=self._rank,
            NUM_RANKS=self._num_ranks,
            DATA_START=self._layout.data_start,
            NUM_BLOCKS=_NUM_BLOCKS,
            REGION=region,
            ITEMS=per_block,
            num_warps=max(1, min(16, per_block // 256)),
        )
        return out


class _ThisProcess:
    """Remembers across gangs."""

    has_shared = False
    """Whether it was asked for its memory before. Torch (`StoreExchange` of its symmetric memory) numbers what ranks
    tell each other from the start of their processes on: one that was in a gang would wait for one that was in none."""


def open_peer_all_reduce(group: dist.ProcessGroup, device: torch.device) -> tuple[PeerAllReduce | None, str]:
    """For ranks that can map each other's memory; else None. And why. All ranks of the group call it together.

    None also where a rank's process was in another gang before.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    layout = _Layout(size)
    problem = ""
    memory = handle = None
    try:
        # Torch's symmetric memory: allocated so that peers can map it, through CUDA's or HIP's own means.
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
    except _NOT_TO_BE_HAD as exc:
        problem = f"{type(exc).__name__}: {exc}".splitlines()[0]
    if not _can_all(memory is not None, group, device):
        return None, problem or "another rank has no memory that its peers can map"
    if not _can_all(not _ThisProcess.has_shared, group, device):
        return None, "a rank's process was in a gang before, and torch shares the memory of ranks once"
    _ThisProcess.has_shared = True
    assert memory is not None, "all have"
    try:
        handle = symmetric.rendezvous(memory, group)
    except _NOT_TO_BE_HAD as exc:
        problem = f"{type(exc).__name__}: {exc}".splitlines()[0]
    if not _can_all(handle is not None, group, device):  # behind it, everybody's flags are zero too
        return None, problem or "another rank cannot map its peers' memory"
    assert handle is not None, "all have"
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    peers = PeerAllReduce(rank=rank, memory=memory, addresses=addresses, keep=handle)
    return peers, f"peer memory up to {peers.max_bytes // KiB} KiB"


def _can_all(can_this: bool, group: dist.ProcessGroup, device: torch.device) -> bool:  # noqa: FBT001 - the answer
    """Whether all ranks can."""
    can_all = torch.tensor(can_this, dtype=torch.int32, device=device)
    dist.all_reduce(can_all, op=dist.ReduceOp.MIN, group=group)
    return bool(can_all.item())


@triton.jit
def _data(addresses_ptr, rank, x_ptr, DATA_START: tl.constexpr):
    """Where the data of a rank begins. Said to be aligned, or each item would be a message of its own between chips."""
    data = (tl.load(addresses_ptr + rank) + DATA_START).to(tl.pointer_type(x_ptr.dtype.element_ty))
    return tl.multiple_of(data, 16)


@triton.jit
def _sum_kernel(
    x_ptr,
    out_ptr,
    num_items,
    addresses_ptr,
    counts_ptr,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    DATA_START: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    REGION: tl.constexpr,
    ITEMS: tl.constexpr,
):
    block = tl.program_id(0)
    count = tl.load(counts_ptr + block) + 1
    item = tl.arange(0, ITEMS)
    is_inside = block * ITEMS + item < num_items
    x = tl.load(x_ptr + block * ITEMS + item, is_inside, other=0.0)
    # Where this block's data is, in items of the dtype, in every rank's memory alike.
    first = ((count % 2) * NUM_BLOCKS + block) * REGION
    own = _data(addresses_ptr, RANK, x_ptr, DATA_START)
    tl.store(own + first + item, x, is_inside)
    barrier_behind_stores()  # what all threads stored comes before the flag that one of them raises
    for step in tl.static_range(1, NUM_RANKS):
        peer = (RANK + step) % NUM_RANKS
        flags = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + block * NUM_RANKS + RANK, count, sem="release", scope="sys")
    mine = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int32))
    for step in tl.static_range(1, NUM_RANKS):
        peer = (RANK + step) % NUM_RANKS
        seen = tl.atomic_add(mine + block * NUM_RANKS + peer, 0, sem="acquire", scope="sys")
        while seen - count < 0:
            seen = tl.atomic_add(mine + block * NUM_RANKS + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()  # and what all threads load comes behind the flags that one of them saw
    total = tl.zeros([ITEMS], tl.float32)
    for rank in tl.static_range(0, NUM_RANKS):
        if rank == RANK:
            total += x.to(tl.float32)
        else:
            other = _data(addresses_ptr, rank, x_ptr, DATA_START)
            addend = tl.load(other + first + item, is_inside, other=0.0, volatile=True)
            total += addend.to(tl.float32)
    tl.store(out_ptr + block * ITEMS + item, total.to(x_ptr.dtype.element_ty), is_inside)
    tl.store(counts_ptr + block, count)
