from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.tools import profile_offline, simple_inference
from tests.tiny_models import tiny_model_dir

SMALL = ("--device", "cpu", "--max-num-seqs", "4", "--max-model-len", "64")


def test_profile_offline_runs_a_workload_and_leaves_traces_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = ("--bs", "2", "--random_input_len", "6", "--random-output-len", "3")
    model = ("--model", str(tiny_model_dir("llama")), "--torch_profiler_dir", str(tmp_path))
    assert profile_offline.main([*model, *SMALL, *workload]) == 0
    printed = capsys.readouterr().out
    (trace,) = tmp_path.glob("*.gz")
    assert f"trace: {trace}" in printed
    assert "| prefill | 1 |" in printed and "| decode bs=2 | 2 |" in printed
    assert len(list(tmp_path.glob("*_breakdown/breakdown.xlsx"))) == 1


@pytest.mark.demo_model
def test_simple_inference_prints_answers_with_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "demo:smollm2-135m-instruct", "--temperature", "0", "--max_tokens", "8")
    prompts = ("--prompt", "What is the capital of France?", "--prompt", "1 + 2 = ?")
    assert simple_inference.main([*arguments, *SMALL, *prompts]) == 0
    printed = capsys.readouterr().out
    assert "The capital of France is Paris." in printed
    assert "tokens/s" in printed


def test_an_error_is_printed_and_becomes_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert simple_inference.main(["--model", "m", "--cudagraph-mode", "AF_PIECEWISE"]) == 1
    assert "error: --cudagraph-mode AF_PIECEWISE" in capsys.readouterr().err
