"""What the nixl transport runs over on this host, and how UCX, the library underneath, is told so.

Only memory that can be read without the help of the process it belongs to: by a network card, by a GPU, by the kernel.
For the rest UCX emulates reads with messages, for which the other process has to be trusted and has to stay: whoever
reaches its socket can have any memory of it read and written, and when a reader dies or lets go in the middle, UCX
aborts the process that was answering. So emulation is turned off. TCP between hosts is what the tcp transport is for.

With an RDMA device UCX opens no sockets. Without one, agents of one host find each other through the loopback device.
What the operator says in UCX's own variables comes first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from atom_cluster.config.env import default_variable, is_variable_set
from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.shared_memory import name_in_realm

_SYSTEM = Path("/")
_EMULATION = "UCX_PROTO_EMULATION_ENABLE"


@dataclass(frozen=True, slots=True)
class Fabric:
    """How agents of this host reach others."""

    transport_name: str
    """Engines with equal ones can read from each other."""
    engine_config: str
    """For NIXL's UCX backend: `VARIABLE=value`, without the prefix `UCX_`. A variable that is set comes before it."""


def find_fabric(*, system: Path = _SYSTEM) -> Fabric:
    """The fabric of this host. `system`: the root directory.

    Raises `TransferError` when the operator has set the variable that allows emulation.
    """
    if is_variable_set(_EMULATION):
        raise TransferError(f"{_EMULATION} is set; with it, the end of a reader can be the end of who it reads from")
    if has_rdma(system=system):
        return Fabric("nixl@rdma", "TLS=^tcp,PROTO_EMULATION_ENABLE=n")
    return Fabric(name_in_realm("nixl"), "NET_DEVICES=lo,PROTO_EMULATION_ENABLE=n")


def has_rdma(*, system: Path = _SYSTEM) -> bool:
    """Whether an RDMA device of this host has an active port and may be used by this process."""
    verbs = (system / "dev/infiniband").glob("uverbs*")
    if not any(os.access(path, os.R_OK | os.W_OK) for path in verbs):
        return False
    states = (system / "sys/class/infiniband").glob("*/ports/*/state")
    return any("ACTIVE" in state.read_text(encoding="ascii") for state in states)


def prepare_ucx(*, system: Path = _SYSTEM) -> None:
    """Set variables that UCX takes when it is loaded and in no other way, unless the operator has set them."""
    # At its own level, giving an agent up prints a line for every piece of a read that was under way.
    default_variable("UCX_LOG_LEVEL", "error")
    if not has_rdma(system=system):
        # The wheel's libraries for RDMA devices and those of a distribution, loaded together, crash when the process
        # exits.
        default_variable("UCX_MODULES", "^ib")
