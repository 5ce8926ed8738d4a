"""Which plan channel joins which rank: shared memory on rank 0's host, ZMQ elsewhere. Knows node names, not Ray."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from msgspec import Struct

from atom_cluster.errors import GangError
from atom_cluster.gang.plan_channel import FanOut, PlanReceiver, PlanSender
from atom_cluster.gang.shm_receiver import connect_shm
from atom_cluster.gang.shm_sender import ShmPlanSender
from atom_cluster.gang.shm_wire import ShmAddress
from atom_cluster.gang.zmq_channel import ZmqAddress, ZmqPlanSender, connect_zmq

_HAS_SHARED_MEMORY = sys.platform == "linux"


class ChannelAddresses(Struct, frozen=True, kw_only=True):
    """How followers reach rank 0. Contains secrets: it travels through Ray, from rank 0 by the head to followers."""

    node: str
    """Rank 0's node."""
    shm: ShmAddress | None = None
    zmq: ZmqAddress | None = None

    def describe(self) -> str:
        """Which channels are in use, for the start-up log and /v1/cluster."""
        used = [name for name, address in (("shared memory", self.shm), ("zmq", self.zmq)) if address is not None]
        return " and ".join(used)


def listen(
    *, node: str, host: str, node_by_rank: Mapping[int, str], send_timeout_s: float
) -> tuple[PlanSender, ChannelAddresses]:
    """Rank 0's end for all followers, and what they need to connect. `host` is this node's address."""
    near = tuple(rank for rank, other in node_by_rank.items() if other == node and _HAS_SHARED_MEMORY)
    far = tuple(rank for rank in node_by_rank if rank not in near)
    shm = ShmPlanSender(near, send_timeout_s=send_timeout_s) if near else None
    zmq = ZmqPlanSender(far, host=host, send_timeout_s=send_timeout_s) if far else None
    addresses = ChannelAddresses(
        node=node, shm=None if shm is None else shm.address, zmq=None if zmq is None else zmq.address
    )
    return FanOut([sender for sender in (shm, zmq) if sender is not None]), addresses


def connect(addresses: ChannelAddresses, *, rank: int, node: str, timeout_s: float) -> PlanReceiver:
    """A follower's end. Raises `GangError` when rank 0 cannot be reached."""
    if addresses.node == node and addresses.shm is not None:
        return connect_shm(addresses.shm, rank=rank, timeout_s=timeout_s)
    if addresses.zmq is None:
        raise GangError(f"rank {rank} on node {node} was not expected by rank 0 on node {addresses.node}")
    return connect_zmq(addresses.zmq, rank=rank, timeout_s=timeout_s)
