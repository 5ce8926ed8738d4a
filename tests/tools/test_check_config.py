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

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
}


def write_file(directory: Path, model: str, **group: object) -> Path:
    args = {"model": model, "unified": group or {"device": "cpu"}}
    content = {
        "http_options": {"host": "127.0.0.1"},
        "applications": [{"import_path": "recipe:build", "args": args}],
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


def test_a_config_json_stands_for_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps(MODEL))
    path = write_file(tmp_path, str(tmp_path / "absent"))
    text = explain_file(path, model_config=tmp_path / "elsewhere.json")
    assert f"by {tmp_path / 'elsewhere.json'}" in text
    # 0.5 GiB of blocks of 16 tokens with 2 x 2 heads of 4 numbers of four bytes.
    assert f"KV tokens      {((1 << 29) // (16 * 2 * 2 * 4 * 4)) * 16}" in text


def test_what_is_printed_is_yaml_with_the_memory_in_comments(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    text = explain_file(write_file(tmp_path, "m", device="cuda"), accelerator="h200", model_config=tmp_path)
    assert load_args(yaml.safe_load(text)).unified is not None
    assert "# unified: 1 x 1 ranks on H200; each rank:" in text.splitlines()
    assert "# in all: 1 H200, at least 1 node of 8" in text.splitlines()


def test_gpus_that_are_not_here_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    with pytest.raises(ConfigError, match="--accelerator"):
        explain_file(write_file(tmp_path, "m", device="cuda"), model_config=tmp_path)


def test_an_accelerator_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MI300X, MI355X, H200"):
        explain_file(write_file(tmp_path, "m"), accelerator="H20")
