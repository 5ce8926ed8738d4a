import json
from pathlib import Path

import pytest

from benchmarks import kv_transfer


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 tokens: what is tested is not how fast gigabytes are read."""
    monkeypatch.setattr(kv_transfer, "CHUNK_TOKENS", 64)


def test_transports_are_measured_and_those_that_cannot_work_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    kv_transfer.main(
        ["--transports", "shm", "ipc", "--block-kib", "16", "64", "--mib", "1", "--repeats", "2", "--save"]
    )
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    sized = record["rates"][:4]
    assert [(rate["block_bytes"], rate["order"], rate["num_blocks"]) for rate in sized] == [
        (16384, "in order", 64),
        (16384, "scattered", 64),
        (65536, "in order", 16),
        (65536, "scattered", 16),
    ]
    assert {rate["what"] for rate in record["rates"][4:]} == {"llama_8b", "llama_70b, 1 of 8 ranks", "deepseek_r1"}
    for rate in sized:
        assert rate["transport"] == "shm"
        assert rate["gib_per_s"] * rate["seconds"] * 2**30 == pytest.approx(2**20)
        assert rate["best_seconds"] <= rate["seconds"]
    assert record["failures"].keys() == {"ipc"}
    assert "memory of GPUs" in record["failures"]["ipc"]


def test_wrong_bytes_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_transfer, "contents", lambda group, num_blocks: kv_transfer.torch.full((num_blocks,), 9))
    with pytest.raises(SystemExit, match="wrong bytes"):
        kv_transfer.main(["--transports", "shm", "--block-kib", "16", "--mib", "1", "--repeats", "1"])
