"""Configurations of Qwen3-Next and Qwen3.5, as published and as newer tools write them."""

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.qwen3_5.spec import read_qwen3_5_spec
from atom_cluster.models.qwen3_next.spec import HybridSpec, read_qwen3_next_spec

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
NEXT = {"architectures": ["Qwen3NextForCausalLM"], **SIZES, **EXPERTS}
INTERVAL = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2


def read_next(values: dict[str, object]) -> HybridSpec:
    return read_qwen3_next_spec(HfConfig(values))


def test_published_and_newer_spellings_mean_the_same() -> None:
    published = {
        **NEXT,
        "rope_theta": 1e7,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "torch_dtype": "bfloat16",
    }
    published |= {"full_attention_interval": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    newer = {**NEXT, "layer_types": INTERVAL, "rope_parameters": rope, "dtype": "bfloat16"}
    spec = read_next(published)
    assert spec == read_next(newer)
    assert (spec.rope.rotary_dim, spec.rope.theta, sorted(spec.linear_layers)) == (8, 1e7, [0, 1, 2, 4, 5, 6])
    assert (spec.dense_layers, spec.dense_size, spec.num_draft_layers) == (frozenset(), None, 1)


def test_layers_without_experts_are_listed_or_counted() -> None:
    spec = read_next({**NEXT, "mlp_only_layers": [1], "decoder_sparse_step": 4})
    assert (spec.dense_layers, spec.dense_size) == ({0, 1, 2, 4, 5, 6}, 128)


@pytest.mark.parametrize("kind", ["", "Moe"])
def test_the_text_part_of_a_multimodal_model_is_read_like_the_text_model(kind: str) -> None:
    values = {**SIZES, **EXPERTS, "mtp_num_hidden_layers": 1, "eos_token_id": 7, "dtype": "bfloat16"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [2, 1, 1]}
    alone = HfConfig({**values, "architectures": [f"Qwen3_5{kind}ForCausalLM"]})
    text_config = {**values, "architectures": None}
    name = f"Qwen3_5{kind}ForConditionalGeneration"
    nested = HfConfig({"architectures": [name], "text_config": text_config, "vision_config": {"hidden_size": 16}})
    found, expected = read_qwen3_5_spec(nested), read_qwen3_5_spec(alone)
    assert found.architecture == name
    assert (found.attention, found.linear_attention, found.moe) == (
        expected.attention,
        expected.linear_attention,
        expected.moe,
    )
    assert (found.rope, found.eos_token_ids, found.checkpoint_dtype) == (expected.rope, (7,), "bfloat16")
    assert (found.num_draft_layers, found.rope.rotary_dim) == (1, 8)
    assert (found.moe is None, found.dense_size) == ((True, 128) if kind == "" else (False, None))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim"),
        ({"layer_types": INTERVAL[1:]}, "layer_types"),
        ({"layer_types": [*INTERVAL[1:], "sliding_attention"]}, "layer_types"),
        ({"num_experts": None}, "num_experts"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_next({**NEXT, **change})
