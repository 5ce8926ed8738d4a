from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from atom_cluster.config.model_path import demo_model_dir, resolve_model_path
from atom_cluster.errors import ConfigError


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ATOM_CLUSTER_CACHE", str(tmp_path))
    return tmp_path


def test_a_local_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("some/model") == tmp_path / "some" / "model"


def test_the_demo_model_is_in_the_cache(cache: Path) -> None:
    demo_model_dir().mkdir()
    assert resolve_model_path("demo:smollm2-135m-instruct") == cache / "smollm2-135m-instruct"


def test_an_absent_demo_model_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(ConfigError, match="run `atom-cluster get-demo-model` first"):
        resolve_model_path("demo:smollm2-135m-instruct")


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "demo:other"])
def test_what_can_only_be_a_directory_is_not_looked_up_in_the_hub(model: str) -> None:
    with pytest.raises(ConfigError, match=f"model `{model}`"):
        resolve_model_path(model)


def test_a_hub_id_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((model, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_path("owner/model", "v1") == tmp_path
    assert resolve_model_path("owner/model", with_weights=False) == tmp_path
    texts = ["*.json", "tokenizer*", "*.jinja"]
    assert calls == [("owner/model", "v1", [*texts, "*.safetensors"]), ("owner/model", None, texts)]


def test_a_model_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="model `not a hub id!` is no local directory"):
        resolve_model_path("not a hub id!")
