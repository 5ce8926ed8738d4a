"""The NIXL library, behind the few calls that the transport makes: one agent, with KV memory registered, on UCX.

What is told here and not in NIXL's documentation was read in version 1.5.1 and tried:
- Its progress thread takes a whole core, also when there is nothing to do. So there is none, and whoever owns an agent
  calls `progress`.
- Releasing a transfer that is under way does not stop it, and neither does forgetting the agent it reads from: what is
  still to come is written. What does end it is destroying the agent, which takes the connections, the queues of the
  network card and the registration of the memory with it. That takes milliseconds and does not wait for any peer.
- A transfer may end with an error while parts of it are under way.

Knows nothing of peers' names, blocks, deadlines or threads. The only file that imports NIXL.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.config.env import is_variable_set
from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.nixl_fabric import Fabric, prepare_ucx
from atom_cluster.kv_transfer.registry import NIXL_MODULES

R = TypeVar("R")
_DONE, _RUNNING = "DONE", "PROC"


@dataclass(frozen=True, slots=True)
class Memory:
    """What kind of memory some addresses are of."""

    kind: str
    """NIXL's word: `DRAM` or `VRAM`."""
    device: int
    """Number of the GPU as its own process counts, 0 for the CPU."""

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        """The kind of memory that tensors on this device have."""
        return cls("DRAM", 0) if device.type == "cpu" else cls("VRAM", device.index or 0)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What to read: uint64 [num_pieces] each."""

    local: npt.NDArray[np.uint64]
    """Addresses to write to."""
    remote: npt.NDArray[np.uint64]
    """Addresses to read from, in the peer's process."""
    num_bytes: npt.NDArray[np.uint64]


@dataclass(slots=True, eq=False)
class Transfer:
    """A read under way, or over. Made by `NixlAgent.post`; keeps no agent alive."""

    handle: Any


class NixlAgent:
    """Owns its connections and the registration of the memory, not the memory. Used by one thread at a time."""

    def __init__(self, name: str, *, spans: Sequence[tuple[int, int]], memory: Memory, fabric: Fabric) -> None:
        """`name`: unique, peers see it. `spans`: start and length of the memory to register, which must not overlap.

        Raises `TransferError` when NIXL is not installed, or cannot work with this memory or on this host.
        """
        library = load_library()
        self._errors: tuple[type[Exception], ...] = library.errors
        self._memory = memory
        self._transfers: set[Transfer] = set()
        self._agent: Any = None
        config = library.package.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=[])
        agent = self._call("cannot make an agent", library.package.nixl_agent, name, config)
        self._call("cannot use UCX", agent.create_backend, "UCX", {"engine_config": fabric.engine_config})
        descriptors = [(start, num_bytes, memory.device, "") for start, num_bytes in spans]
        self._call("cannot register the KV memory", agent.register_memory, descriptors, memory.kind)
        self.metadata: bytes = self._call("cannot describe the agent", agent.get_agent_metadata)
        """What others need to read from here, the keys to the registered memory among it."""
        self._agent = agent

    def connect(self, metadata: bytes) -> str:
        """Load a peer's metadata; returns the peer's name. Whether it can be reached is told by reads.

        The metadata must be authentic: UCX does not survive all that can be wrong with it.
        """
        name: str | bytes = self._call("cannot connect", self._agent.add_remote_agent, metadata)
        return name if isinstance(name, str) else name.decode()

    def disconnect(self, name: str) -> None:
        """Forget a peer from which nothing is being read."""
        self._call("cannot disconnect", self._agent.remove_remote_agent, name)

    def post(self, name: str, memory: Memory, pieces: Pieces) -> Transfer:
        """Start to read from a peer, whose memory is of this kind. With a `TransferError`, parts may be under way."""
        local = self._describe(pieces.local, pieces.num_bytes, self._memory)
        remote = self._describe(pieces.remote, pieces.num_bytes, memory)
        transfer = Transfer(self._call("cannot read", self._agent.initialize_xfer, "READ", local, remote, name))
        self._transfers.add(transfer)
        _check(self._call("cannot read", self._agent.transfer, transfer.handle))
        return transfer

    def is_over(self, transfer: Transfer) -> bool:
        """Whether all of it has been read; then the transfer is released. With a `TransferError`, parts may not be."""
        if not _check(self._call("the read failed", self._agent.check_xfer_state, transfer.handle)):
            return False
        self._transfers.remove(transfer)
        self._call("cannot release the read", transfer.handle.release)
        return True

    def progress(self) -> None:
        """Let UCX do what is to be done: answer peers, receive. Does not wait."""
        # Nobody sends us notifications; those of strangers are not to pile up.
        self._call("cannot make progress", self._agent.get_new_notifs)

    def close(self) -> None:
        """Destroy the agent, whatever is under way: nothing is read or written afterwards. Idempotent.

        Raises `TransferError` if it could not be destroyed.
        """
        for transfer in self._transfers:
            with contextlib.suppress(*self._errors):
                transfer.handle.release()
            transfer.handle = None
        self._transfers.clear()
        agent, self._agent = self._agent, None
        if agent is None:
            return
        core = agent.agent
        del agent
        # Ours and that of the call. Another would keep the agent working behind our back.
        if sys.getrefcount(core) > 2:
            raise TransferError("the NIXL agent is still in use and cannot be destroyed")

    def _describe(self, addresses: npt.NDArray[np.uint64], num_bytes: npt.NDArray[np.uint64], memory: Memory) -> object:
        rows = np.stack([addresses, num_bytes, np.full_like(addresses, memory.device)], axis=1)
        return self._call("cannot describe what to read", self._agent.get_xfer_descs, rows, memory.kind)

    def _call(self, what: str, function: Callable[..., R], *arguments: object) -> R:
        """The result; NIXL's errors as a `TransferError`."""
        try:
            return function(*arguments)
        except self._errors as exc:
            error = f"{what}: {exc}"
        # Not raised in the handler, and without these names: in a traceback they would keep the agent alive.
        del function, arguments
        raise TransferError(error)


@dataclass(frozen=True, slots=True)
class _Library:
    package: Any
    errors: tuple[type[Exception], ...]


def load_library() -> _Library:
    """NIXL, imported once. Raises `TransferError` that says what to install."""
    prepare_ucx()
    cuda = (torch.version.cuda or "").partition(".")[0]
    reasons = []
    for name in sorted(NIXL_MODULES, key=lambda name: name != f"nixl_cu{cuda}"):
        raises_logging_exceptions = logging.raiseExceptions
        try:
            package = importlib.import_module(name)
            bindings = importlib.import_module(f"{name}._bindings")
        except (ImportError, OSError) as exc:
            reasons.append(str(exc))
            continue
        finally:
            logging.raiseExceptions = raises_logging_exceptions
        _tame_logger()
        return _Library(package, (*_exceptions(vars(bindings).values()), RuntimeError, ValueError))
    raise TransferError("NIXL cannot be imported; install nixl-cu13 or nixl-cu12 (" + "; ".join(reasons) + ")")


def _exceptions(values: Iterable[object]) -> list[type[Exception]]:
    return [value for value in values if isinstance(value, type) and issubclass(value, Exception)]


def _tame_logger() -> None:
    """NIXL prints to the standard output by itself; make its messages go the way of all others."""
    logger = logging.getLogger("nixl")
    if not logger.handlers:
        return
    logger.handlers.clear()
    logger.propagate = True
    if not is_variable_set("NIXL_LOG_LEVEL"):
        logger.setLevel(logging.WARNING)


def _check(state: str) -> bool:
    """Whether a transfer in this state is over. Raises `TransferError` for a failed one, and for an unknown state."""
    if state not in (_DONE, _RUNNING):
        raise TransferError(f"the read failed: state {state}")
    return state == _DONE
