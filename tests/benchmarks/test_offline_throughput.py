import json
from pathlib import Path

import pytest

from benchmarks import offline_throughput
from benchmarks.shapes import SHAPES, model_dir
from tests.tiny_models import tiny_model_dir


def test_both_engines_are_measured_and_the_result_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    settings = ["--workload", "1x12x8", "3x12x8", "--dtype", "float32", "--repeats", "2", "--save"]
    offline_throughput.main(["--model", str(tiny_model_dir("llama")), "--peer", "transformers", *settings])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert [row["workload"]["num_requests"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        num_output = row["workload"]["num_requests"] * 8
        assert row["seconds"] == min(row["all_seconds"])
        assert row["output_tokens_per_s"] == pytest.approx(num_output / row["seconds"])
        assert row["all_tokens_per_s"] == pytest.approx(2.5 * row["output_tokens_per_s"])
        assert row["ratio"] > 0
        assert row["equal_outputs"] == 1.0
    assert {"commit", "command", "hardware", "software"} <= set(record)


def test_a_wrong_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="3x4"):
        offline_throughput.Workload.parse("3x4")


def test_every_shape_is_a_model_that_can_be_read() -> None:
    from atom_cluster.models.registry import read_spec

    for name in SHAPES:
        assert read_spec(model_dir(f"shape:{name}:2")).num_layers == 2
