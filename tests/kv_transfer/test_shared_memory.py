from __future__ import annotations

import gc
import os
import stat
import struct
import subprocess
import sys

import msgspec
import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.shared_memory import (
    SharedSpan,
    allocate_shared,
    host_realm,
    locate,
    map_read_only,
    process_start_time,
)
from tests.processes import call_elsewhere


def test_memory_is_zeroed_writable_and_readable_through_its_span() -> None:
    memory = allocate_shared(10_000)
    assert memory.dtype == torch.uint8
    assert not memory.any()
    memory.view(100, 100)[7, 3] = 42
    span = locate(memory.view(100, 100)[7])
    mapping = map_read_only(span, 10_000)
    assert span.offset_bytes == 700
    assert mapping[span.offset_bytes + 3] == 42
    with pytest.raises(TypeError):
        mapping[0] = 1


def read_second_float(encoded: bytes) -> float:
    span = msgspec.msgpack.decode(encoded, type=SharedSpan)
    number: float = struct.unpack_from("d", map_read_only(span, 5000), 8)[0]
    return number


def test_another_process_reads_it() -> None:
    memory = allocate_shared(5000)
    memory.view(torch.float64)[1] = 2.5
    assert call_elsewhere(read_second_float, msgspec.msgpack.encode(locate(memory))) == 2.5


def test_memory_has_no_name_is_private_to_the_user_and_cannot_shrink() -> None:
    memory = allocate_shared(4096)
    path = f"/proc/self/fd/{locate(memory).fd}"
    assert os.readlink(path).endswith("(deleted)")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(PermissionError):
        os.truncate(path, 0)


def test_memory_and_descriptor_go_with_the_tensor() -> None:
    memory = allocate_shared(4096)
    span = locate(memory)
    part = memory[8:16]
    del memory
    gc.collect()
    assert locate(part).inode == span.inode
    del part
    gc.collect()
    with pytest.raises(TransferError):
        map_read_only(span, 4096)


def test_ordinary_memory_cannot_be_located() -> None:
    with pytest.raises(TransferError, match="allocate_shared"):
        locate(torch.zeros(1 << 20))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("start_time", 1, "is gone"),
        ("inode", 1, "not the shared memory"),
        ("fd", 0, "not the shared memory"),
        ("fd", 99_999, "cannot open"),
        ("pid", 1, "cannot open|not the shared memory|is gone"),
        ("realm", "elsewhere", "another host"),
    ],
)
def test_a_span_that_is_not_what_it_says_is_refused(field: str, value: int | str, message: str) -> None:
    memory = allocate_shared(4096)
    span = msgspec.structs.replace(locate(memory), **{field: value})
    with pytest.raises(TransferError, match=message):
        map_read_only(span, 4096)


def test_memory_that_is_smaller_than_announced_is_refused() -> None:
    memory = allocate_shared(4096)
    with pytest.raises(TransferError, match="smaller"):
        map_read_only(locate(memory), 4097)


def test_a_process_that_ended_has_no_start_time_even_before_it_is_reaped() -> None:
    assert process_start_time(os.getpid()) is not None
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert process_start_time(process.pid) is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_time(process.pid) is None
    process.communicate()
    assert process_start_time(process.pid) is None


def test_the_realm_is_the_same_for_all_processes_here() -> None:
    assert call_elsewhere(host_realm) == host_realm()
