"""Configurations of models with windows as they are on the hub, and those that no layer of ours can run."""

import json

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.registry import spec_from_config
from tests.tiny_models import tiny_model_dir


def tiny_config(name: str) -> dict[str, object]:
    values: dict[str, object] = json.loads((tiny_model_dir(name) / "config.json").read_text())
    return values


def spec_of(values: dict[str, object]) -> object:
    return spec_from_config(HfConfig(values))


def test_gpt_oss_in_the_old_spelling() -> None:
    new = tiny_config("gpt_oss")
    rope = dict(new["rope_parameters"])
    old = {
        **new,
        "rope_parameters": None,
        "layer_types": None,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "experts_per_token": 2,
    }
    assert spec_of(old) == spec_of(new)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 8.0}])
def test_gemma3_in_the_old_spelling(scaling: dict[str, object] | None) -> None:
    base = {**tiny_config("gemma3"), "sliding_window_pattern": 3, "layer_types": None}
    old = {**base, "rope_parameters": None, "rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": scaling}
    full = {"rope_type": "default", **(scaling or {}), "rope_theta": 2e6}
    local = {"rope_type": "default", "rope_theta": 3e4}
    new = {**base, "rope_parameters": {"full_attention": full, "sliding_attention": local}}
    assert spec_of(old) == spec_of(new)


def test_gemma3_that_sees_says_of_its_text_part_only_what_is_unusual() -> None:
    spec = spec_of(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.windows[:6] == (4096,) * 5 + (None,)
    assert (spec.eos_token_ids, spec.has_tied_embeddings) == ((1, 106), True)


def test_olmo3_in_the_old_spelling_stretches_full_layers_only() -> None:
    base = {**tiny_config("olmo3"), "rope_parameters": None}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    spec = spec_of({**base, "rope_theta": 5e5, "rope_scaling": yarn})
    assert (spec.rope.kind, spec.rope.theta) == ("yarn", 5e5)
    assert (spec.local_rope.kind, spec.local_rope.theta) == ("default", 5e5)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
        ("olmo3", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_cannot_run_is_refused_by_name(name: str, change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        spec_of({**tiny_config(name), **change})
