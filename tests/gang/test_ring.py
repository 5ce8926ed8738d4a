from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.gang.ring import Ring, create_memory_file

NUM_BYTES = 64


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Ring, Ring]]:
    fd = create_memory_file(NUM_BYTES)
    writer, reader = Ring(fd, NUM_BYTES, is_writable=True), Ring(fd, NUM_BYTES, is_writable=False)
    os.close(fd)
    yield writer, reader
    writer.close()
    reader.close()


@given(position=st.integers(0, 1000), data=st.binary(max_size=NUM_BYTES))
def test_what_is_written_at_a_position_is_read_there_by_another_mapping(
    ends: tuple[Ring, Ring], position: int, data: bytes
) -> None:
    writer, reader = ends
    writer.write(position, memoryview(data))
    assert reader.read(position, len(data)) == data


def test_a_reader_cannot_write(ends: tuple[Ring, Ring]) -> None:
    with pytest.raises(TypeError):
        ends[1].write(0, memoryview(b"x"))
