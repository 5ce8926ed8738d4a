import json
from pathlib import Path

import pytest

from benchmarks import offline_throughput
from tests.tiny_models import tiny_model_dir


def test_both_engines_are_measured_and_the_result_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_throughput, "RESULTS_DIR", tmp_path / "results")
    settings = ["--batch", "1", "3", "--input-len", "12", "--output-len", "8", "--repeats", "1", "--save"]
    offline_throughput.main(["--model", str(tiny_model_dir("llama")), *settings])
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert [row["batch"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row["ours_tokens_per_s"] / row["peer_tokens_per_s"])
        assert row["equal_outputs"] == 1.0
    assert {"commit", "command", "hardware", "software"} <= set(record)
