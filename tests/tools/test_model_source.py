from __future__ import annotations

import json
from pathlib import Path

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.tools import model_source
from atom_cluster.tools.model_source import find_model

VALUES = {"architectures": ["LlamaForCausalLM"]}


def test_a_file_counts_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(VALUES))
    assert find_model("deepseek-ai/DeepSeek-R1", file=path).values == VALUES


def test_a_local_directory_counts_before_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    found = find_model(str(tmp_path))
    assert (found.values, found.where) == (VALUES, f"in {tmp_path}")
    assert find_model("x/y", file=tmp_path).values == VALUES


def test_what_is_known_is_not_fetched() -> None:
    found = find_model("moonshotai/Kimi-K2-Instruct")
    assert found.values["n_routed_experts"] == 384
    assert "as published" in found.where


def test_of_others_the_hub_is_asked_for_config_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(model: str, revision: str | None) -> Path:
        asked.append((model, revision))
        path = tmp_path / "config.json"
        path.write_text(json.dumps(VALUES))
        return path

    monkeypatch.setattr(model_source, "fetch_model_config", fetch)
    assert find_model("owner/model", "v1").values == VALUES
    assert asked == [("owner/model", "v1")]


def test_a_hub_that_does_not_have_it_is_an_error_that_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="config.json of model `owner/no-such-model`"):
        find_model("owner/no-such-model")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        find_model("owner/model", file=path)


def test_a_demo_model_that_is_not_fetched_is_known_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_CLUSTER_CACHE", str(tmp_path))
    assert find_model("demo:smollm2-135m-instruct").values["hidden_size"] == 576
    with pytest.raises(ConfigError, match="--model-config FILE"):
        find_model("demo:other")
