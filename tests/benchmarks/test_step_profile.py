import json
from pathlib import Path

import pytest

from benchmarks import step_profile
from tests.tiny_models import tiny_model_dir


def test_kernels_and_groups_add_up_and_idle_time_is_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    settings = ["--workload", "3x12x9", "--dtype", "float32", "--save"]
    step_profile.main(["--model", str(tiny_model_dir("llama")), *settings])
    (path,) = tmp_path.iterdir()
    (row,) = [row for row in json.loads(path.read_text())["rows"] if row["phase"] == "decode bs=3"]
    assert row["num_steps"] == 8
    assert 0 < row["step_p50_us"] <= row["step_p99_us"]
    assert 0 < row["idle_share"] < 1
    assert sum(kernel["us_per_step"] for kernel in row["kernels"]) == pytest.approx(sum(row["us_by_group"].values()))
