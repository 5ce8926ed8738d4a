"""Keys change without a restart, and a file that went wrong changes nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path

import pytest

from atom_cluster.api.protection import key_file
from atom_cluster.api.protection.key_file import MAX_FILE_BYTES, KeyFile
from atom_cluster.api.protection.keys import hash_key
from atom_cluster.errors import ConfigError

FIRST, SECOND = "first key", "second key"


def text(name: str, key: str) -> str:
    return f"- {{name: {name}, sha256: {hash_key(key)}}}\n"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text("first", FIRST))
    return path


async def names(keys: KeyFile) -> list[str]:
    return [entry.name for entry in (await keys.keys()).entries]


async def test_a_changed_file_is_read_when_its_time_has_come(path: Path, clock: Clock) -> None:
    keys = KeyFile(path, poll_s=5, clock=clock)
    # Of the same length and with the same time, as a coarse clock of a file system would give.
    times = path.stat()
    path.write_text(text("other", SECOND))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    clock.now_s = 4.9
    assert await names(keys) == ["first"]
    clock.now_s = 5.0
    assert await names(keys) == ["other"]


async def test_a_mounted_secret_changes_by_its_link(tmp_path: Path, clock: Clock) -> None:
    for number, key in enumerate((FIRST, SECOND)):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "keys.yaml").write_text(text(f"k{number}", key))
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    keys = KeyFile(tmp_path / "keys.yaml", poll_s=5, clock=clock)
    (tmp_path / "new").symlink_to("..1")
    (tmp_path / "new").rename(tmp_path / "..data")
    clock.now_s = 5.0
    assert await names(keys) == ["k1"]


@pytest.mark.parametrize("content", [b"", b"- {name: x}", b"\xff", b"#" * (MAX_FILE_BYTES + 1), None])
async def test_a_file_that_went_wrong_leaves_the_keys_and_is_logged_once(
    path: Path, clock: Clock, content: bytes | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("atom_cluster"), "propagate", True)
    keys = KeyFile(path, poll_s=5, clock=clock)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for _ in range(3):
        clock.now_s += 5
        assert await names(keys) == ["first"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert str(path) in record.getMessage()
    path.write_text(text("mended", FIRST))
    clock.now_s += 5
    assert await names(keys) == ["mended"]


async def test_all_who_ask_meanwhile_wait_for_one_reading_even_when_one_of_them_leaves(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyFile(path, poll_s=5, clock=clock)
    num_readings = 0
    read = key_file._read

    def counting_read(path: Path) -> str:
        nonlocal num_readings
        num_readings += 1
        return read(path)

    monkeypatch.setattr(key_file, "_read", counting_read)
    path.write_text(text("other", SECOND))
    clock.now_s = 5.0
    first, *others = [asyncio.create_task(names(keys)) for _ in range(10)]
    await asyncio.sleep(0)
    first.cancel()
    assert await asyncio.gather(*others) == [["other"]] * 9
    assert num_readings == 1


@pytest.mark.parametrize("content", [None, "keys: []"])
def test_nothing_starts_without_its_keys(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        KeyFile(path, poll_s=5)


async def test_a_file_that_does_not_answer_has_one_thread_waiting(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyFile(path, poll_s=5, clock=clock)
    answers, num_reads = threading.Event(), 0

    def read(path: Path) -> str:
        nonlocal num_reads
        num_reads += 1
        answers.wait(20)
        return text("other", SECOND)

    monkeypatch.setattr(key_file, "_read", read)
    monkeypatch.setattr(key_file, "_READ_TIMEOUT_S", 0.01)
    for _ in range(3):
        clock.now_s += 5
        assert await names(keys) == ["first"]
    assert num_reads == 1
    answers.set()
    monkeypatch.setattr(key_file, "_READ_TIMEOUT_S", 20.0)
    clock.now_s += 5
    assert await names(keys) == ["other"]
