import json
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.offline_throughput import Workload
from benchmarks.prefill_rate import operations
from tests.tiny_models import tiny_model_dir


def test_parts_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    startup.main(["--save", "--model", str(tiny_model_dir("llama")), "--max-model-len", "200"])
    (path,) = tmp_path.iterdir()
    starts = json.loads(path.read_text())["starts"]
    assert [start["caches"] for start in starts] == ["cold", "warm"]
    for start in starts:
        assert start["total_s"] == pytest.approx(start["imports_s"] + start["engine_s"] + start["first_token_s"])
        assert "load" in start["parts"]


def test_operations_of_a_prompt_are_counted() -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "vocab_size": 10,
    }
    # q, k, v, o: 8x8, 8x4, 8x4, 8x8; the MLP 3 x 8x16; 5 positions see 15 pairs.
    per_prompt = 3 * (2 * (64 + 32 + 32 + 64 + 384) * 5 + 4 * 2 * 4 * 15) + 2 * 8 * 10
    assert operations(config, Workload(7, 5, 1)) == 7 * per_prompt
