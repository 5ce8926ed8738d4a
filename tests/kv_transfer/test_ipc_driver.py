"""The drivers' calls have the arguments of the published signatures; what the libraries do with them is not here."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import ipc_driver
from atom_cluster.kv_transfer.ipc_driver import HANDLE_BYTES, CudaDriver, GpuDriver, HipDriver

BASE, SIZE, MAPPED = 0x7F00_0000_0000, 1 << 40, 0x7E12_3456_7000
CONTEXT = 0xC0FFEE
HANDLE = bytes(range(HANDLE_BYTES))


class Library:
    """Both drivers' libraries: notes the calls and answers as they would."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failure = 0
        self.contexts: list[int] = []
        self.device = 5
        self.absent: set[str] = set()
        self.hipGetErrorString = lambda code: b"invalid argument"

    def __getattr__(self, name: str) -> Any:
        if name in self.absent:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            plain = [getattr(argument, "value", argument) for argument in arguments]
            self.calls.append((name, *plain))
            if name in {"cuIpcGetMemHandle", "hipIpcGetMemHandle"}:
                arguments[0]._obj.reserved[:] = list(HANDLE)
            elif name in {"cuIpcOpenMemHandle_v2", "hipIpcOpenMemHandle"}:
                assert bytes(arguments[1].reserved) == HANDLE
                arguments[0]._obj.value = MAPPED
            elif name in {"cuMemGetAddressRange_v2", "hipMemGetAddressRange"}:
                arguments[0]._obj.value, arguments[1]._obj.value = BASE, SIZE
            return self.failure

        return call

    def cuInit(self, flags: ctypes.c_uint) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: ctypes.c_int) -> int:  # noqa: N802
        device._obj.value = index.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:  # noqa: N802
        context._obj.value = CONTEXT + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:  # noqa: N802
        self.contexts.append(context.value or 0)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts.pop()
        return 0

    def cuGetErrorString(self, code: ctypes.c_int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"invalid argument"
        return 0

    def hipGetDevice(self, device: Any) -> int:  # noqa: N802
        device._obj.value = self.device
        return 0

    def hipSetDevice(self, device: ctypes.c_int) -> int:  # noqa: N802
        self.device = device.value
        return 0

    def hipGetLastError(self) -> int:  # noqa: N802
        self.calls.append(("hipGetLastError",))
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(ipc_driver.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(ipc_driver, "_loaded_library", lambda name: name)
    return library


@pytest.fixture(params=[CudaDriver, HipDriver])
def driver(request: pytest.FixtureRequest, library: Library) -> GpuDriver:
    driver: GpuDriver = request.param(2)
    return driver


def test_handles_are_got_opened_and_closed(driver: GpuDriver, library: Library) -> None:
    assert driver.allocation_around(BASE + 5) == (BASE, SIZE)
    assert driver.get_handle(BASE) == HANDLE
    assert driver.open_handle(HANDLE) == MAPPED
    driver.close_handle(MAPPED)
    around, get, opened, closed = library.calls
    assert around[3] == BASE + 5
    assert get[2] == BASE
    assert opened[3] == 1, "the flag that both drivers require"
    assert closed[1] == MAPPED
    assert (library.contexts, library.device) == ([], 5), "the thread's own device is current again"


COPIES = [(BASE, MAPPED, 7 << 32), (BASE + 9, MAPPED + 9, 1), (BASE + 90, MAPPED + 70, 4)]
"""Target, source, bytes."""


def give_copies(driver: GpuDriver, copies: list[tuple[int, int, int]] = COPIES) -> None:
    targets, sources, sizes = np.array(copies).T.copy()
    driver.copy(targets, sources, sizes, stream=0xABC)


@pytest.mark.parametrize(("kind", "arguments"), [(CudaDriver, ()), (HipDriver, (4,))])
def test_copies_go_to_the_stream_one_by_one(
    kind: type[CudaDriver | HipDriver], arguments: tuple[int, ...], library: Library
) -> None:
    library.absent = {"cuMemcpyBatchAsync"}
    give_copies(kind(2))
    assert [call[1:] for call in library.calls] == [(*copy, *arguments, 0xABC) for copy in COPIES]
    assert (library.contexts, library.device) == ([], 5)


def test_few_copies_are_not_worth_a_call_for_many(library: Library) -> None:
    give_copies(CudaDriver(2), COPIES[:2])
    assert library.calls == [("cuMemcpyAsync", *copy, 0xABC) for copy in COPIES[:2]]


def test_copies_go_to_the_stream_in_one_call_where_there_is_one(library: Library) -> None:
    given: list[tuple[object, ...]] = []

    def batch(*arguments: Any) -> int:
        *addresses, count, attributes, of_all, num_attributes, _, stream = arguments
        numbers = [ctypes.cast(one, ctypes.POINTER(ctypes.c_uint64))[: count.value] for one in addresses]
        given.extend(zip(*numbers))
        assert attributes._obj.source_access_order == 1
        assert (list(of_all), num_attributes.value, stream.value) == ([0], 1, 0xABC)
        assert library.contexts == [CONTEXT + 2]
        return library.failure

    library.cuMemcpyBatchAsync = batch
    driver = CudaDriver(2)
    give_copies(driver)
    assert given == COPIES
    assert library.contexts == []
    library.failure = 1
    with pytest.raises(TransferError, match="cuMemcpyBatchAsync: invalid argument"):
        give_copies(driver)


def test_failures_are_told_in_the_drivers_words(driver: GpuDriver, library: Library) -> None:
    library.failure = 1
    calls = (
        lambda: driver.get_handle(BASE),
        lambda: give_copies(driver),
        lambda: driver.close_handle(1),
    )
    for call in calls:
        with pytest.raises(TransferError, match=r"^(cu|hip)\w+: invalid argument \(1\)$"):
            call()
    assert (library.contexts, library.device) == ([], 5)
    if isinstance(driver, HipDriver):
        assert library.calls.count(("hipGetLastError",)) == 3, "or torch would find the failure and take it for its own"


def test_the_context_is_given_back_once(library: Library) -> None:
    driver = CudaDriver(2)
    driver.close()
    driver.close()
    assert [call for call in library.calls if call[0] == "cuDevicePrimaryCtxRelease_v2"] == [
        ("cuDevicePrimaryCtxRelease_v2", 2)
    ]


def test_no_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ipc_driver.ctypes, "CDLL", absent)
    with pytest.raises(TransferError, match=r"libcuda\.so\.1"):
        CudaDriver(0)
    with pytest.raises(TransferError, match="libamdhip64"):
        HipDriver(0)
