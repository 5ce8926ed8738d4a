"""What the API reads from a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atom_cluster.api.text.model_files import GenerationDefaults, ServedModel
from atom_cluster.errors import ConfigError

CONFIG = {"max_position_embeddings": 128, "vocab_size": 10, "eos_token_id": 2}


def write(directory: Path, config: object, generation: object | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_end_tokens_come_from_both_files_and_defaults_from_generation_config(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [7, 2], "pad_token_id": 0}
    model = ServedModel.from_directory(write(tmp_path, CONFIG, generation), served_name="m")
    assert model.eos_token_ids == (7, 2)
    assert model.defaults == GenerationDefaults(temperature=0.6, top_k=20)
    assert (model.name, model.max_model_len, model.vocab_size) == ("m", 128, 10)


@pytest.mark.parametrize(
    ("do_sample", "expected"),
    [
        ({}, GenerationDefaults(temperature=0.1, repetition_penalty=1.2)),
        ({"do_sample": False}, GenerationDefaults(repetition_penalty=1.2)),
    ],
)
def test_sampling_values_count_unless_greedy_decoding_is_recommended(
    tmp_path: Path, do_sample: dict[str, object], expected: GenerationDefaults
) -> None:
    generation = {"temperature": 0.1, "repetition_penalty": 1.2, **do_sample}
    model = ServedModel.from_directory(write(tmp_path, CONFIG, generation))
    assert model.defaults == expected
    assert model.name == tmp_path.name


def test_recommendations_can_be_left_out_but_not_end_tokens(tmp_path: Path) -> None:
    directory = write(tmp_path, CONFIG, {"do_sample": True, "temperature": 0.6, "eos_token_id": [7]})
    model = ServedModel.from_directory(directory, uses_recommendations=False)
    assert (model.defaults, model.eos_token_ids) == (GenerationDefaults(), (7, 2))


def test_the_end_token_that_only_the_tokenizer_knows_counts(tmp_path: Path) -> None:
    tokenizer = {"added_tokens": [{"id": 8, "content": "<|im_end|>", "special": True}], "model": {"vocab": {}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert ServedModel.from_directory(write(tmp_path, CONFIG)).eos_token_ids == (2, 8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ServedModel.from_directory(tmp_path)


def test_end_tokens_of_both_levels_of_a_multimodal_config_count(tmp_path: Path) -> None:
    config = {"eos_token_id": [1, 106], "text_config": {**CONFIG, "eos_token_id": 1}}
    assert ServedModel.from_directory(write(tmp_path, config)).eos_token_ids == (1, 106)


def test_given_length_replaces_the_checkpoint_s(tmp_path: Path) -> None:
    assert ServedModel.from_directory(write(tmp_path, CONFIG), max_model_len=32).max_model_len == 32


def test_language_part_of_a_multimodal_config_counts(tmp_path: Path) -> None:
    assert ServedModel.from_directory(write(tmp_path, {"text_config": CONFIG})).max_model_len == 128


@pytest.mark.parametrize(
    ("config", "generation", "named"),
    [
        ({**CONFIG, "vocab_size": "ten"}, None, "config.json: `vocab_size`"),
        ({"vocab_size": 10}, None, "max_position_embeddings"),
        ([1], None, "config.json"),
        (CONFIG, {"do_sample": True, "temperature": "hot"}, "generation_config.json"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, config: object, generation: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServedModel.from_directory(write(tmp_path, config, generation))


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json: not found"):
        ServedModel.from_directory(tmp_path)
