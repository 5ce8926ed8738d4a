from __future__ import annotations

import logging
from pathlib import Path

import pytest

from atom_cluster.config.load import load_args
from atom_cluster.errors import ConfigError
from atom_cluster.serving import served_file
from atom_cluster.serving.served_file import check_served_file, served_files

ARGS = {"model": "m", "unified": {}}
FILE = """
http_options: {host: 127.0.0.1}
applications:
- import_path: recipe:build
  args: {model: m, unified: {}}
"""


@pytest.fixture
def serve_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As inside a recipe after `serve run cluster.yaml` in this directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(served_file, "_driver_command_lines", lambda: ["/x/python /x/serve run -a local cluster.yaml"])
    (tmp_path / "cluster.yaml").write_text(FILE)
    return tmp_path / "cluster.yaml"


def test_files_are_found_by_the_command_line_of_serve_run(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "a.yaml"
    file.touch()
    lines = ["/x/python /x/bin/serve run --address local configs/a.yaml", f"serve run {file}", "python train.py a.yaml"]
    assert served_files(lines, [Path("/elsewhere"), tmp_path]) == [file]
    assert served_files(["python run configs/a.yaml", "serve run absent.yaml", "serve run app:build"], [tmp_path]) == []


def test_a_good_file_passes_in_silence(serve_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_served_file("recipe:build", load_args(ARGS))
    assert not caplog.records


def test_a_typo_outside_of_args_is_an_error(serve_run: Path) -> None:
    serve_run.write_text(FILE.replace("http_options", "http_option"))
    with pytest.raises(ConfigError, match="http_option: unknown key; did you mean `http_options`"):
        check_served_file("recipe:build", load_args(ARGS))


@pytest.mark.parametrize("text", [FILE.replace("model: m", "model: n"), FILE.replace("recipe", "other"), "[", "- 1"])
def test_a_file_of_another_application_is_not_taken_for_ours(
    serve_run: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    serve_run.write_text(text)
    with caplog.at_level(logging.WARNING):
        check_served_file("recipe:build", load_args(ARGS))
    assert "misspelt keys elsewhere in the configuration go unnoticed" in caplog.text
