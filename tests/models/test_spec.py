"""Reading config.json: both spellings, defaults of each family, and refusals that name the key."""

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.llama.spec import LlamaSpec, read_llama_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def read(values: dict[str, object]) -> LlamaSpec:
    return read_llama_spec(HfConfig(values))


def test_old_and_new_spellings_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {
        **LLAMA,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"type": "llama3", **scaling},
    }
    new = {
        **LLAMA,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling},
    }
    assert read(old) == read(new)
    assert read(new).checkpoint_dtype == "bfloat16"


def test_a_null_rope_scaling_is_the_default_rotation() -> None:
    spec = read({**LLAMA, "rope_theta": 2e4, "rope_scaling": None})
    assert (spec.rope.kind, spec.rope.theta, spec.rope.rotary_dim) == ("default", 2e4, 16)


def test_families_differ_in_biases_norms_and_head_size() -> None:
    llama = read({**LLAMA, "attention_bias": True})
    assert (llama.has_qkv_bias, llama.has_attention_output_bias, llama.has_qk_norm) == (True, True, False)
    qwen2 = read({**LLAMA, "architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.has_qkv_bias, qwen2.has_attention_output_bias, qwen2.head_dim) == (True, False, 16)
    qwen3 = read({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.has_qkv_bias, qwen3.has_qk_norm, qwen3.head_dim) == (False, True, 128)


def test_windows_are_of_the_layers_that_each_family_says() -> None:
    def windows(architecture: str, **values: object) -> tuple[int | None, ...]:
        return read({**LLAMA, "architectures": [architecture], **values}).windows

    assert windows("LlamaForCausalLM", sliding_window=8) == (None, None)
    assert windows("MistralForCausalLM") == (4096, 4096)
    assert windows("MistralForCausalLM", sliding_window=None) == (None, None)
    mixed = ["sliding_attention", "full_attention"]
    assert windows("MinistralForCausalLM", sliding_window=8, layer_types=mixed) == (8, None)
    assert windows("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1) == (None, None)
    assert windows("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1, use_sliding_window=True) == (None, 8)
    assert windows("Qwen3ForCausalLM", sliding_window=8, use_sliding_window=True) == (None, None)


def test_end_tokens_may_be_one_several_or_none() -> None:
    assert read(LLAMA).eos_token_ids == ()
    assert read({**LLAMA, "eos_token_id": 2}).eos_token_ids == (2,)
    assert read({**LLAMA, "eos_token_id": [2, 5]}).eos_token_ids == (2, 5)


def test_yarn_extends_the_stated_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read({**LLAMA, "rope_scaling": yarn}).max_positions == 1024


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"dtype": "int8"}, "int8"),
        ({"architectures": []}, "architectures"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read({**LLAMA, **change})
