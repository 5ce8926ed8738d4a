from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from atom_cluster.config.facts import ModelFacts, PlatformFacts
from atom_cluster.config.load import load_args
from atom_cluster.config.resolve import resolve
from atom_cluster.errors import ConfigError
from atom_cluster.tools.check_config import describe, explain_file

MODEL = {"max_position_embeddings": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}


def write_file(directory: Path, model: str) -> Path:
    content = {
        "http_options": {"host": "127.0.0.1"},
        "applications": [{"import_path": "recipe:build", "args": {"model": model, "unified": {"device": "cpu"}}}],
    }
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_description_is_yaml_of_the_resolved_configuration_with_reasons() -> None:
    config = load_args({"model": "m", "unified": {"resources_per_rank": {"big": 1}}})
    platform = PlatformFacts(vendor="cpu", num_gpus=0, num_cores=4, is_single_host=True)
    resolved = resolve(config, platform, ModelFacts.from_config(MODEL))
    text = describe(resolved)
    assert load_args(yaml.safe_load(text)) == resolved.config
    assert text.count("# auto: ") == len(resolved.reasons)
    assert "  device: cpu  # auto: the cluster has no GPU" in text.splitlines()


def test_a_file_is_explained_for_this_machine(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    text = explain_file(write_file(tmp_path, str(tmp_path / "model")))
    assert "max_model_len: 64  # auto: limit of the checkpoint" in text
    assert f"model in {tmp_path / 'model'}" in text


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        explain_file(write_file(tmp_path, str(tmp_path / "absent")))
