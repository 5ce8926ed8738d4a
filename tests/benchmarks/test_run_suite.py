import json
from pathlib import Path

import pytest

from benchmarks import disaggregation, latency, offline_throughput, prefill_rate, run_suite, step_profile
from tests.tiny_models import tiny_model_dir

SUITES = sorted((Path(run_suite.__file__).parent / "suites").glob("*.txt"))


def test_what_fails_does_not_keep_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path / "results"))
    suite = tmp_path / "suite.txt"
    options = f"--model {tiny_model_dir('llama')} --workload 1x4x2 --repeats 1"
    suite.write_text(f"# two\noffline_throughput --no-such-option\noffline_throughput {options}\n")
    assert run_suite.main([str(suite)]) == 1
    assert "no-such-option" in capsys.readouterr().out
    assert len(list((tmp_path / "results").iterdir())) == 1


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_every_line_of_a_suite_can_be_read(suite: Path) -> None:
    parsers = {
        "offline_throughput": offline_throughput.parse_arguments,
        "latency": latency.parse_arguments,
        "prefill_rate": prefill_rate.parse_arguments,
        "step_profile": step_profile.parse_arguments,
        "disaggregation": disaggregation.parse_arguments,
    }
    lines = [line.split() for line in suite.read_text().splitlines() if not line.startswith("#")]
    assert lines
    for name, *options in lines:
        if name in parsers:
            parsers[name](options)
        else:
            assert name == "startup" or Path("benchmarks", f"{name.replace('.', '/')}.py").is_file()


def test_tables_of_ops_are_saved_as_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path / "results"))
    package = tmp_path / "benchmarks" / "ops"
    package.mkdir(parents=True)
    (package / "made_up.py").write_text("import sys; print('shape  us'); print(sys.argv[1], 7)")
    monkeypatch.chdir(tmp_path)
    assert run_suite.run("ops.made_up decode", 60.0)
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert record["table"] == ["shape  us", "decode 7"]
    assert record["command"] == "python -m benchmarks.ops.made_up decode"
