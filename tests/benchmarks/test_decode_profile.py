import json
from pathlib import Path

import pytest

from benchmarks import decode_profile
from tests.tiny_models import tiny_model_dir


def test_idle_and_busy_time_make_up_the_periods_of_steps_that_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    settings = ["--workload", "3x12x24", "--dtype", "float32", "--save"]
    decode_profile.main(["--model", str(tiny_model_dir("llama")), *settings])
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["phase"] == "decode bs=3"
    assert 5 <= row["num_steps"] <= 24
    assert 0 < row["step_p50_us"] <= row["step_p99_us"]
    assert 0 < row["idle_share"] < 1
    assert sum(kernel["us_per_step"] for kernel in row["kernels"]) == pytest.approx(sum(row["us_by_group"].values()))


def test_a_window_without_steps_that_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too few output tokens"):
        decode_profile.main(["--model", str(tiny_model_dir("llama")), "--workload", "1x12x2", "--dtype", "float32"])
