from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from atom_cluster import __version__
from atom_cluster.tools.__main__ import main


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_error_is_printed_and_becomes_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("http_option: {}\n")
    assert main(["check-config", str(file)]) == 1
    assert "http_option: unknown key; did you mean `http_options`?" in capsys.readouterr().err


@pytest.mark.demo_model
def test_the_shipped_configurations_check_out(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((repo_root / "configs").glob("smollm2*.yaml"))
    assert files
    for file in files:
        assert main(["check-config", str(file)]) == 0
        assert "max_model_len: 8192  # auto: limit of the checkpoint" in capsys.readouterr().out


@pytest.mark.demo_model
def test_a_demo_model_that_is_there_is_not_fetched_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get-demo-model"]) == 0
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["check-config"]])
def test_wrong_usage_exits_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_drill_that_is_terminated_cleans_up_as_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def drill(names: Sequence[str], **options: object) -> bool:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            found.append("goes on")
        finally:
            found.append("cleaned up")
        return True

    monkeypatch.setattr("atom_cluster.tools.drill.run.drill", drill)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["drill", "all", "--url", "http://127.0.0.1:1"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == ["cleaned up"]
