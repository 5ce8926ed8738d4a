"""Memory handles between processes, and copies, by the calls of NVIDIA's and AMD's drivers. Knows numbers only.

Through ctypes, since torch offers handles only together with its own counting of who uses a tensor. CUDA's driver
library, not its runtime's: it is there under one name wherever there is a driver, and tells which allocation an address
belongs to. HIP's library is the one that torch has loaded.

What is guaranteed. A handle stands for one allocation: memory allocated later at the same address has another. A
mapping is valid until it is closed, if the owner keeps the allocation; freeing it earlier is undefined, so KV memory
has to live as long as its process. What becomes of a mapping when the owner's process ends, the references of CUDA and
HIP do not say. Should the device fault on such memory, this process's context is lost, and every later call raises.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.regions import IntArray

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
"""The only flag there is, and required."""
_HIP_COPY_DEFAULT = 4
"""Where memory is follows from the addresses."""

_DURING_STREAM = 1
"""Of a batch of copies: sources may be read once the stream is there, not earlier."""
_ONE_BY_ONE_BELOW = 3
"""Fewer copies than this take the calling thread no longer one by one than in a batch, which takes it 10 microseconds
at least."""


class GpuDriver(Protocol):
    """Calls for one device; may be used in any thread. All raise `TransferError` with the driver's own words."""

    def allocation_around(self, address: int) -> tuple[int, int]:
        """Start and bytes of the allocation that an address of this process is in."""
        ...

    def get_handle(self, start: int) -> bytes:
        """`HANDLE_BYTES` by which other processes map the allocation that starts here."""
        ...

    def open_handle(self, handle: bytes) -> int:
        """Map an allocation of another process for the device: its start. Can take long the first time."""
        ...

    def close_handle(self, start: int) -> None:
        """Undo one `open_handle`."""
        ...

    def copy(self, targets: IntArray, sources: IntArray, sizes: IntArray, stream: int) -> None:
        """Give copies to a stream: addresses, bytes. Returns before they are done; if refused, some may be made."""
        ...

    def close(self) -> None:
        """Not used any more."""
        ...


class _Handle(ctypes.Structure):
    """Passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _Calls:
    """The calls that CUDA and HIP have in common, but for their names."""

    _GET = _OPEN = _CLOSE = _RANGE = _COPY = ""
    _COPY_KIND: tuple[ctypes.c_int, ...] = ()

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def allocation_around(self, address: int) -> tuple[int, int]:
        """See `GpuDriver`."""
        start, num_bytes = ctypes.c_void_p(), ctypes.c_size_t()
        self._call(self._RANGE, ctypes.byref(start), ctypes.byref(num_bytes), ctypes.c_void_p(address))
        return start.value or 0, num_bytes.value

    def get_handle(self, start: int) -> bytes:
        """See `GpuDriver`."""
        handle = _Handle()
        self._call(self._GET, ctypes.byref(handle), ctypes.c_void_p(start))
        return bytes(handle.reserved)

    def open_handle(self, handle: bytes) -> int:
        """See `GpuDriver`."""
        start = ctypes.c_void_p()
        by_value = _Handle.from_buffer_copy(handle)
        self._call(self._OPEN, ctypes.byref(start), by_value, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return start.value or 0

    def close_handle(self, start: int) -> None:
        """See `GpuDriver`."""
        self._call(self._CLOSE, ctypes.c_void_p(start))

    def copy(self, targets: IntArray, sources: IntArray, sizes: IntArray, stream: int) -> None:
        """See `GpuDriver`."""
        function = getattr(self._library, self._COPY)
        with self._current():
            for target, source, num_bytes in zip(targets.tolist(), sources.tolist(), sizes.tolist()):
                pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
                code = function(*pointers, ctypes.c_size_t(num_bytes), *self._COPY_KIND, ctypes.c_void_p(stream))
                if code:
                    raise TransferError(f"{self._COPY}: {self._message(code)}")

    def _call(self, name: str, *arguments: Any) -> None:
        with self._current():
            if code := getattr(self._library, name)(*arguments):
                raise TransferError(f"{name}: {self._message(code)}")

    def _current(self) -> contextlib.AbstractContextManager[None]:
        """With the device's context as this thread's."""
        raise NotImplementedError

    def _message(self, code: int) -> str:
        raise NotImplementedError


class _BatchAttributes(ctypes.Structure):
    """How copies of a batch are made. The hints are for memory that moves between devices."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


class CudaDriver(_Calls):
    """NVIDIA's driver. Holds a reference to the context that torch uses too."""

    _GET, _OPEN, _CLOSE = "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"
    _RANGE, _COPY = "cuMemGetAddressRange_v2", "cuMemcpyAsync"

    def __init__(self, device_index: int) -> None:
        try:
            super().__init__(ctypes.CDLL("libcuda.so.1"))
        except OSError as exc:
            raise TransferError(f"cannot load NVIDIA's driver library: {exc}") from exc
        self._context = ctypes.c_void_p()
        self._handle = ctypes.c_int()
        for name, *arguments in (
            ("cuInit", ctypes.c_uint(0)),
            ("cuDeviceGet", ctypes.byref(self._handle), ctypes.c_int(device_index)),
            ("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._handle),
        ):
            if code := getattr(self._library, name)(*arguments):
                raise TransferError(f"{name}: {self._message(code)}")
        self._copy_batch = getattr(self._library, "cuMemcpyBatchAsync", None)
        self._batch_attributes = _BatchAttributes(source_access_order=_DURING_STREAM)
        self._of_all = (ctypes.c_size_t * 1)(0)

    def copy(self, targets: IntArray, sources: IntArray, sizes: IntArray, stream: int) -> None:
        """See `GpuDriver`. In one call since CUDA 12.8: without, each copy takes 3 microseconds or more."""
        if self._copy_batch is None or len(sizes) < _ONE_BY_ONE_BELOW:
            super().copy(targets, sources, sizes, stream)
            return
        refused = ctypes.c_size_t()
        with self._current():
            code = self._copy_batch(
                ctypes.c_void_p(targets.ctypes.data),
                ctypes.c_void_p(sources.ctypes.data),
                ctypes.c_void_p(sizes.ctypes.data),
                ctypes.c_size_t(len(sizes)),
                ctypes.byref(self._batch_attributes),
                self._of_all,
                ctypes.c_size_t(1),
                ctypes.byref(refused),
                ctypes.c_void_p(stream),
            )
        if code:
            raise TransferError(f"cuMemcpyBatchAsync: {self._message(code)}")

    def close(self) -> None:
        """See `GpuDriver`. Idempotent."""
        if self._context.value is not None:
            self._library.cuDevicePrimaryCtxRelease_v2(self._handle)
            self._context.value = None

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        if code := self._library.cuCtxPushCurrent_v2(self._context):
            raise TransferError(f"cuCtxPushCurrent: {self._message(code)}")
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _message(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({code})"


class HipDriver(_Calls):
    """AMD's. Not run yet: written after HIP's reference."""

    _GET, _OPEN, _CLOSE = "hipIpcGetMemHandle", "hipIpcOpenMemHandle", "hipIpcCloseMemHandle"
    _RANGE, _COPY, _COPY_KIND = "hipMemGetAddressRange", "hipMemcpyAsync", (ctypes.c_int(_HIP_COPY_DEFAULT),)

    def __init__(self, device_index: int) -> None:
        super().__init__(ctypes.CDLL(_loaded_library("libamdhip64.so")))
        self._library.hipGetErrorString.restype = ctypes.c_char_p
        self._device_index = device_index

    def close(self) -> None:
        """See `GpuDriver`. Nothing is held."""

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        before = ctypes.c_int()
        self._library.hipGetDevice(ctypes.byref(before))
        self._library.hipSetDevice(ctypes.c_int(self._device_index))
        try:
            yield
        finally:
            self._library.hipSetDevice(before)

    def _message(self, code: int) -> str:
        # HIP remembers a failure, and torch would take it for one of its own next launch.
        self._library.hipGetLastError()
        return f"{self._library.hipGetErrorString(ctypes.c_int(code)).decode()} ({code})"


def open_driver(device: torch.device) -> GpuDriver:
    """The driver of a torch device of type cuda. Raises `TransferError` when it cannot be used."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # the context is there from here on
    return CudaDriver(device.index) if torch.version.hip is None else HipDriver(device.index)


def _loaded_library(name: str) -> str:
    """Path of a library that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            path = line.split(maxsplit=5)[-1].strip()
            if path.rpartition("/")[2].startswith(name):
                return path
    raise TransferError(f"torch has not loaded {name}")
