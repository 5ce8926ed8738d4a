"""Reading config.json of mixture-of-experts families, in the spelling of published checkpoints and in the new one."""

from collections.abc import Callable

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.models.glm4_moe.spec import read_glm4_moe_spec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.minimax_m2.spec import read_minimax_m2_spec
from atom_cluster.models.mixtral.spec import read_mixtral_spec
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec
from atom_cluster.models.qwen_moe.spec import read_qwen_moe_spec

COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
}
QWEN3 = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1e6,
    "rope_scaling": None,
    "sliding_window": None,
    "max_window_layers": 6,
    "use_sliding_window": False,
}
QWEN2 = {
    **QWEN3,
    "architectures": ["Qwen2MoeForCausalLM"],
    "head_dim": None,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": False,
}
MIXTRAL = {**COMMON, "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "rope_theta": 1e6}
MINIMAX = {
    **COMMON,
    "architectures": ["MiniMaxM2ForCausalLM"],
    "head_dim": 32,
    "num_local_experts": 8,
    "rotary_dim": 16,
    "rope_theta": 5000000,
    "scoring_func": "sigmoid",
}
GLM = {
    **COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "head_dim": 32,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attention_bias": True,
}

Reader = Callable[[HfConfig], MoeDecoderSpec]


@pytest.mark.parametrize(
    ("reader", "old", "partial"),
    [
        (read_qwen_moe_spec, QWEN3, 1.0),
        (read_qwen_moe_spec, QWEN2, 1.0),
        (read_mixtral_spec, MIXTRAL, 1.0),
        (read_minimax_m2_spec, MINIMAX, 0.5),
        (read_glm4_moe_spec, GLM, 0.5),
    ],
)
def test_old_and_new_spellings_mean_the_same(reader: Reader, old: dict[str, object], partial: float) -> None:
    gone = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
    new = {key: value for key, value in old.items() if key not in gone}
    new["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": old["rope_theta"],
        "partial_rotary_factor": partial,
    }
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    spec = reader(HfConfig(old))
    assert reader(HfConfig(new)) == spec
    assert spec.moe.num_experts == 8
    assert spec.rope.rotary_dim == spec.attention.head_dim * partial


def test_families_differ_in_their_routers() -> None:
    qwen3, qwen2 = (read_qwen_moe_spec(HfConfig(values)).moe for values in (QWEN3, QWEN2))
    assert (qwen3.router.score, qwen3.router.renormalize, qwen3.shared_size) == ("softmax", True, None)
    assert (qwen2.router.renormalize, qwen2.shared_size, qwen2.shared_gate_name) == (False, 48, "shared_expert_gate")
    minimax = read_minimax_m2_spec(HfConfig(MINIMAX)).moe
    assert (minimax.router.score, minimax.router.bias_name) == ("sigmoid", "e_score_correction_bias")
    glm = read_glm4_moe_spec(HfConfig(GLM)).moe
    assert (glm.router.bias_name, glm.router.scale, glm.shared_size) == ("gate.e_score_correction_bias", 2.5, 24)


def test_which_layers_have_no_experts() -> None:
    assert read_qwen_moe_spec(HfConfig(QWEN3)).dense_layers == frozenset()
    every_third = read_qwen_moe_spec(HfConfig({**QWEN3, "decoder_sparse_step": 3, "mlp_only_layers": [2]}))
    assert every_third.dense_layers == {0, 1, 2, 3, 4}
    assert read_glm4_moe_spec(HfConfig(GLM)).dense_layers == {0, 1, 2}


def test_attention_follows_the_configuration() -> None:
    biased = read_glm4_moe_spec(HfConfig(GLM)).attention
    assert (biased.has_qkv_bias, biased.has_output_bias, biased.qk_norm) == (True, False, "head")
    plain = read_glm4_moe_spec(HfConfig({**GLM, "use_qk_norm": False, "attention_bias": False})).attention
    assert (plain.has_qkv_bias, plain.qk_norm) == (False, None)
    assert read_minimax_m2_spec(HfConfig(MINIMAX)).attention.qk_norm == "projection"
    windows = [read_mixtral_spec(HfConfig({**MIXTRAL, "sliding_window": size})).attention.window for size in (None, 7)]
    assert windows == [None, 7]


def test_layers_for_drafting_are_counted() -> None:
    counts = [
        read_glm4_moe_spec(HfConfig({**GLM, "num_nextn_predict_layers": number})).num_draft_layers
        for number in (None, 0, 1)
    ]
    assert counts == [0, 0, 1]


@pytest.mark.parametrize(
    ("reader", "values", "named"),
    [
        (read_qwen_moe_spec, {**QWEN3, "num_experts": None}, "num_experts"),
        (read_qwen_moe_spec, {**QWEN3, "use_sliding_window": True}, "use_sliding_window"),
        (read_qwen_moe_spec, {**QWEN2, "shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        (read_mixtral_spec, {**MIXTRAL, "hidden_act": "gelu"}, "hidden_act"),
        (read_minimax_m2_spec, {**MINIMAX, "scoring_func": "softmax"}, "scoring_func"),
        (read_glm4_moe_spec, {**GLM, "moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
)
def test_what_cannot_run_is_refused_by_name(reader: Reader, values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        reader(HfConfig(values))
