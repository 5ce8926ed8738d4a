from __future__ import annotations

import json
from pathlib import Path

import pytest

from atom_cluster.config.facts import EvenKv, ModelFacts, read_model_facts
from atom_cluster.errors import ConfigError

CONFIG: dict[str, object] = {
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
}


def test_facts_are_read_from_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    facts = read_model_facts(tmp_path)
    assert facts == ModelFacts(
        dtype="bfloat16", max_positions=4096, kv=EvenKv(num_layers=4, num_kv_heads=2, head_dim=64)
    )


def test_both_spellings_and_explicit_sizes_are_understood() -> None:
    facts = ModelFacts.from_config({**CONFIG, "dtype": "float32", "head_dim": 128, "num_key_value_heads": None})
    assert (facts.dtype, facts.kv) == ("float32", EvenKv(num_layers=4, num_kv_heads=8, head_dim=128))


def test_kv_bytes_count_keys_and_values_of_the_fullest_rank() -> None:
    kv = EvenKv(num_layers=4, num_kv_heads=3, head_dim=64)
    assert kv.bytes_per_token(element_bytes=4, num_ranks=1) == 2 * 4 * 3 * 64 * 4
    assert kv.bytes_per_token(element_bytes=2, num_ranks=2) == 2 * 4 * 2 * 64 * 2


def test_facts_of_a_model_for_more_than_text_are_those_of_its_text_part() -> None:
    nested = {"dtype": "bfloat16", "text_config": {**CONFIG, "max_position_embeddings": 1024}}
    assert ModelFacts.from_config(nested).max_positions == 1024


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": 512},
        {"sliding_window": 128},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"full_attention_interval": 4},
    ],
)
def test_what_uneven_layers_keep_is_left_to_the_engine(change: dict[str, object]) -> None:
    assert ModelFacts.from_config({**CONFIG, **change}).kv is None
    assert ModelFacts.from_config({**CONFIG, "layer_types": ["full_attention"], "sliding_window": None}).kv is not None


@pytest.mark.parametrize("value", [None, "8", 0, True])
def test_a_wrong_value_names_its_key(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": value}))
    with pytest.raises(ConfigError, match=r"config\.json: `num_hidden_layers` should be a positive integer"):
        read_model_facts(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_unusable_config_json_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_facts(tmp_path)
