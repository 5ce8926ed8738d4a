"""Process groups of one gang, built once from rank information. Knows no layers; see `collectives.py` for their use."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from atom_cluster.errors import ConfigError, GangError

if TYPE_CHECKING:
    from atom_cluster.parallel.peer_all_reduce import PeerAllReduce  # imports triton, which CPUs do without


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that work on one thing together, and this process's place among them."""

    rank: int
    size: int
    handle: dist.ProcessGroup | None
    """None for a group of one, which needs no communication."""
    peers: PeerAllReduce | None = None
    """For small sums, where ranks can read each other's memory."""


_ALONE = Group(rank=0, size=1, handle=None)


class ProcessGroups:
    """All groups that a rank belongs to. `close` leaves them; it is idempotent and every rank must call it."""

    def __init__(self, tensor: Group, expert: Group | None = None, *, choice: str = "one rank") -> None:
        self.tensor = tensor
        """Ranks that split every layer's weights and KV heads."""
        self.expert = expert or _ALONE
        """Ranks that divide experts among them, each holding whole ones; a group of one: experts are split as well."""
        self.choice = choice
        """How ranks communicate and why, for the start-up log."""

    @classmethod
    def single(cls) -> ProcessGroups:
        """A gang of one rank: no communication, nothing to close."""
        return cls(_ALONE)

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        world_size: int,
        init_method: str,
        device: torch.device,
        divides_experts: bool = False,
        timeout_s: float = 600.0,
    ) -> ProcessGroups:
        """Join a gang; returns when all `world_size` ranks have called this with the same `init_method`.

        `init_method` is `tcp://host:port`, an address of rank 0's node, or torch's `file:///path`. CPUs talk through
        Gloo, GPUs through NCCL (RCCL on ROCm). `timeout_s` bounds joining and each collective. With `world_size` 1
        nothing is joined. `divides_experts`: the same ranks are the `expert` group. Raises `GangError` if rank 0 cannot
        listen at its address.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not in a gang of {world_size}")
        if world_size == 1:
            return cls.single()
        backend: Literal["gloo", "nccl"] = "gloo" if device.type == "cpu" else "nccl"
        store = _store(init_method, rank=rank, world_size=world_size, timeout_s=timeout_s)
        dist.init_process_group(
            backend,
            init_method=init_method if store is None else None,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=None if device.type == "cpu" else device,
        )
        peers, reason = None, "CPUs"
        if device.type != "cpu":
            from atom_cluster.parallel.peer_all_reduce import open_peer_all_reduce

            assert dist.group.WORLD is not None, "just initialised"
            peers, reason = open_peer_all_reduce(dist.group.WORLD, device)
        everyone = Group(rank=rank, size=world_size, handle=dist.group.WORLD, peers=peers)
        return cls(everyone, everyone if divides_experts else None, choice=f"{backend}; small sums: {reason}")

    def close(self) -> None:
        """Leave the groups."""
        if self.tensor.handle is not None and dist.is_initialized():
            dist.destroy_process_group()


def _store(init_method: str, *, rank: int, world_size: int, timeout_s: float) -> Store | None:
    """Where ranks find each other, for `tcp://`. Raises `GangError` if rank 0 cannot listen there."""
    address = urlsplit(init_method)
    if address.scheme != "tcp":
        return None
    host, port, descriptor = address.hostname or "", address.port or 0, None
    if rank == 0:
        # torch itself would listen on all interfaces, whatever the address; and whoever connects may write.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.bind((host, port))
        except OSError as exc:
            listener.close()
            raise GangError(f"rank 0 cannot listen on {host}, port {port}: {exc}") from exc
        descriptor = listener.detach()
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world_size, rank == 0, timedelta(seconds=timeout_s), master_listen_fd=descriptor
    )
    return store
