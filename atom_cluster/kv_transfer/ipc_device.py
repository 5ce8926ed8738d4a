"""What the `ipc` transport asks of a GPU: share an allocation, map a peer's, copy between the two, say when it is done.

`IpcDevice` is the seam behind which tests put memory of CPUs. `GpuIpcDevice` is CUDA and HIP, through the driver calls
of `ipc_driver.py`. Addresses are numbers, since torch knows no tensors over what another process allocated.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.ipc_copies import MAX_COPIES, Batch
from atom_cluster.kv_transfer.ipc_driver import GpuDriver, open_driver

if TYPE_CHECKING:
    from atom_cluster.kv_transfer.block_copy import BlockCopier


@dataclass(frozen=True, slots=True)
class SharedAllocation:
    """An allocation of this process that others can map as a whole."""

    handle: bytes
    address: int
    num_bytes: int


class Fence(Protocol):
    """Tells when the device has done the copies that it was given before. `torch.Event` is one."""

    def query(self) -> bool:
        """Whether it has. Raises RuntimeError when the device is lost."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class Lane(Protocol):
    """Carries out copies one call after the other, beside other lanes and the device's other work."""

    def copy(self, batch: Batch) -> None:
        """Begin with these. Raises `TransferError` when the device refuses one; others may have begun."""
        ...

    def fence(self) -> Fence:
        """Of everything given to this lane until now."""
        ...


class IpcDevice(Protocol):
    """One GPU as this process uses it."""

    uuid: str
    """Of the hardware, the same in every process."""

    def share(self, address: int) -> SharedAllocation:
        """The allocation around an address. Raises `TransferError` with the reason if it cannot be shared."""
        ...

    def map(self, handle: bytes, owner_uuid: str) -> int:
        """Map another process's allocation, which is on the GPU `owner_uuid`. Raises `TransferError` if that fails."""
        ...

    def unmap(self, address: int) -> None:
        """Undo one `map`. No copy may be under way."""
        ...

    def open_lane(self) -> Lane:
        """A lane for the copies out of one peer."""
        ...

    def close(self) -> None:
        """Nothing is mapped any more."""
        ...


class GpuIpcDevice:
    """A CUDA or ROCm device of this process. Not run on ROCm yet."""

    def __init__(self, device: torch.device, driver: GpuDriver, copier: BlockCopier) -> None:
        self._device = device
        self._driver = driver
        self._copier = copier
        self.uuid = _uuid(device.index)

    def share(self, address: int) -> SharedAllocation:
        """See `IpcDevice`."""
        try:
            start, num_bytes = self._driver.allocation_around(address)
            return SharedAllocation(self._driver.get_handle(start), start, num_bytes)
        except TransferError as exc:
            raise TransferError(f"{exc}{_known_reason(address)}") from exc

    def map(self, handle: bytes, owner_uuid: str) -> int:
        """See `IpcDevice`. The GPU need not be visible to this process: its memory is mapped for the own one."""
        owner = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == owner_uuid), None)
        own = self._device.index
        if owner not in (None, own) and not torch.cuda.can_device_access_peer(own, owner):
            raise TransferError(f"GPU {self.uuid} cannot address the memory of the peer's GPU {owner_uuid}")
        try:
            return self._driver.open_handle(handle)
        except TransferError as exc:
            where = "this very GPU" if owner == own else f"GPU {owner_uuid}"
            where += ", which is not visible to this process" if owner is None else ""
            raise TransferError(f"cannot map the peer's memory on {where}: {exc}") from exc

    def unmap(self, address: int) -> None:
        """See `IpcDevice`."""
        self._driver.close_handle(address)

    def open_lane(self) -> Lane:
        """See `IpcDevice`."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return _StreamLane(stream, self._driver, self._copier)

    def close(self) -> None:
        """See `IpcDevice`."""
        self._driver.close()


class _StreamLane:
    """`Lane` on a stream of its own."""

    def __init__(self, stream: torch.cuda.Stream, driver: GpuDriver, copier: BlockCopier) -> None:
        self._stream = stream
        self._driver = driver
        self._copier = copier
        self._tables: deque[_AddressTable] = deque()
        """The one that was used longest ago comes first."""
        self._unfenced: list[_AddressTable] = []
        """In use since the last fence."""

    def copy(self, batch: Batch) -> None:
        """See `Lane`."""
        if batch.by_kernel:
            self._copy_by_kernel(batch)
            return
        self._driver.copy(batch.targets, batch.sources, batch.sizes, int(self._stream.cuda_stream))

    def fence(self) -> Fence:
        """See `Lane`."""
        event = self._stream.record_event()
        for table in self._unfenced:
            table.used = event
        self._tables.extend(self._unfenced)
        self._unfenced.clear()
        return cast("Fence", event)

    def _copy_by_kernel(self, batch: Batch) -> None:
        # Rather one table more than to wait for the stream, which a link at its limit keeps busy.
        if not self._tables or not self._tables[0].is_free():
            self._tables.appendleft(_AddressTable())
        table = self._tables.popleft()
        self._unfenced.append(table)
        addresses, count = table.fill(batch), len(batch.sizes)
        with torch.cuda.device(self._stream.device):
            self._copier.copy(addresses, count, int(batch.sizes[0]), batch.alignment, int(self._stream.cuda_stream))


class _AddressTable:
    """Where a batch's blocks are, in memory of the host that the device reads.

    To make such memory anew takes as long as a batch takes to copy.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(MAX_COPIES, 2, dtype=torch.int64, pin_memory=True)
        self._numbers = self._memory.numpy()
        self.used: torch.Event | None = None
        """A fence behind its last use."""

    def is_free(self) -> bool:
        """Whether the stream is done with it."""
        return self.used is None or self.used.query()

    def fill(self, batch: Batch) -> torch.Tensor:
        """Targets and sources, as `BlockCopier` takes them."""
        count = len(batch.sizes)
        self._numbers[:count, 0] = batch.targets
        self._numbers[:count, 1] = batch.sources
        return self._memory


def open_gpu(device: torch.device) -> IpcDevice:
    """For memory on this torch device. Raises `TransferError` when it is not a GPU, or lacks what this needs."""
    if device.type != "cuda":
        raise TransferError(f"ipc shares memory of GPUs; this is on {device}")
    try:
        from atom_cluster.kv_transfer.block_copy import BlockCopier
    except ImportError as exc:
        raise TransferError(f"ipc needs Triton: pip install 'triton>=3.4' ({exc})") from exc
    driver = open_driver(device)
    with torch.cuda.device(device):
        return GpuIpcDevice(device, driver, BlockCopier(device))


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _known_reason(address: int) -> str:
    """Why memory at this address cannot be shared, as far as torch's allocator knows; begins with `: ` if it does."""
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        return f": memory of the {backend} allocator cannot be shared (PYTORCH_CUDA_ALLOC_CONF)"
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if segment["address"] <= address < segment["address"] + segment["total_size"] and segment["is_expandable"]:
            return ": it is in an expandable segment; take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"
    if torch.version.hip is not None:
        return "; on some systems HSA_ENABLE_IPC_MODE_LEGACY=1 forbids it, on others it needs it"
    return ""
