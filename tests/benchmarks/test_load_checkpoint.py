import json
from pathlib import Path

import pytest

from benchmarks import load_checkpoint

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def test_ranks_load_beside_plain_readings_and_the_result_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(load_checkpoint, "CONFIG", {**load_checkpoint.CONFIG, **SMALL, "vocab_size": 128})
    monkeypatch.setattr(load_checkpoint, "FILE_BYTES", 10_000)
    directory = tmp_path / "checkpoint"
    load_checkpoint.main(["--dir", str(directory), "--gigabytes", "0", "--rounds", "1", "--save"])
    assert not directory.exists()
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    (measured,) = record["rounds"]
    assert record["ratio_to_plain_reading"] == pytest.approx(sum(measured["plain_s"]) / 2 / measured["load_s"])
    # One layer and two vocabulary matrices are halved; norms are not.
    halved = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 128 * 64)
    for rank in measured["ranks"]:
        assert rank["shard_bytes"] == halved / 2 + 2 * (3 * 64 + 2 * 16)
        assert rank["shard_bytes"] < rank["bytes_before"] < rank["peak_bytes"]
    assert {"commit", "command", "hardware", "software"} <= set(record)


def test_what_was_there_before_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_checkpoint, "CONFIG", {**load_checkpoint.CONFIG, **SMALL, "vocab_size": 128})
    directory = tmp_path / "checkpoint"
    assert load_checkpoint.write_checkpoint(directory, 0)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    load_checkpoint.main(["--dir", str(directory), "--rounds", "0"])
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a checkpoint"):
        load_checkpoint.main(["--dir", str(tmp_path / "other"), "--gigabytes", "0"])
