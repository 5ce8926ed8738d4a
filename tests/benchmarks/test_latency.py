import json
from pathlib import Path

import pytest

from benchmarks import latency
from tests.tiny_models import tiny_model_dir


def test_times_of_tokens_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    settings = ["--workload", "3x12x6", "--dtype", "float32", "--repeats", "2", "--save"]
    latency.main(["--model", str(tiny_model_dir("llama")), *settings])
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["e2e_ms"]["mean"] == pytest.approx(row["ttft_ms"]["mean"] + 5 * row["tpot_ms"]["mean"])
    assert 0 < row["step_ms"]["p50"] <= row["step_ms"]["p99"] <= row["step_ms"]["max"] < row["e2e_ms"]["max"]
