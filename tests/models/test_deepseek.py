"""Latent attention and its sparse form in whole models: long prompts, narrow caches, hub configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayerLayout
from atom_cluster.models.deepseek.spec import DeepseekSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.registry import load_model, spec_from_config
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import random_tokens, reference_logits, tiny_model_dir

NAMES = ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"]


def make_driver(name: str, backend: str, kv_dtype: str | None = None) -> PagedDriver:
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    context = replace(make_context(ops), kv_dtype=kv_dtype)
    return PagedDriver(load_model(tiny_model_dir(name), context=context, max_model_len=512))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_in_chunks_match(name: str, backend: str) -> None:
    """Long enough for the expanded form and for many tiles; the second chunk sees what the first has cached."""
    tokens = random_tokens(300)
    driver = make_driver(name, backend)
    steps = [[(0, tokens[:110])], [(0, tokens[110:298])], [(0, tokens[298:299])], [(0, tokens[299:])]]
    logits = torch.cat([driver.step(rows)[0] for rows in steps])
    torch.testing.assert_close(logits, reference_logits(name, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_to_verify_match(name: str) -> None:
    """Rows of a few queries behind a cached prompt, beside a row that decodes."""
    first, second = random_tokens(44, seed=4), random_tokens(37, seed=5)
    driver = make_driver(name, "cpu")
    driver.step([(0, first[:40])])
    driver.step([(1, second[:36])])
    decoded, verified = driver.step([(1, second[36:]), (0, first[40:])])
    torch.testing.assert_close(verified, reference_logits(name, first)[40:], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded, reference_logits(name, second)[36:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_latents_of_eight_bits_change_little(backend: str) -> None:
    tokens = random_tokens(60)
    driver = make_driver("deepseek_v3", backend, "float8_e4m3fn")
    logits = torch.cat([driver.step([(0, tokens[:59])])[0], driver.step([(0, tokens[59:])])[0]])
    expected = reference_logits("deepseek_v3", tokens)
    # The median: where rounding changes the choice of experts, much changes.
    assert 0 < (logits - expected).abs().median() < 0.05 * expected.std()


def test_a_token_keeps_one_latent_and_one_index_key() -> None:
    model = load_model(tiny_model_dir("glm_moe_dsa"), context=make_context(select_cpu()), max_model_len=64)
    layers = [layer for layer in model.kv_layout.layers if isinstance(layer, KvLayerLayout)]
    assert [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers] == [
        (1, 32, 0),
        (1, 16, 0),
        (1, 32, 0),
        (1, 32, 0),
        (1, 16, 0),
        (1, 32, 0),
    ]


def select_cpu() -> object:
    return select_ops(OpsConfig(backend="cpu"), detect_platform("cpu"), torch.float32)


R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def read(values: dict[str, object]) -> DeepseekSpec:
    spec = spec_from_config(HfConfig(values))
    assert isinstance(spec, DeepseekSpec)
    return spec


def test_the_configuration_of_r1_is_read() -> None:
    spec = read(R1)
    assert (spec.rope.kind, spec.rope.factor, spec.rope.rotary_dim, spec.rope.attention_factor) == ("yarn", 40, 64, 1.0)
    assert spec.attention.scale == pytest.approx(0.1352337788608801)
    assert (spec.max_positions, spec.num_draft_layers, spec.dense_layers) == (163840, 1, {0, 1, 2})
    assert (spec.moe.router.num_groups, spec.moe.router.topk_groups, spec.moe.shared_size) == (8, 4, 2048)


def test_layers_with_experts_may_be_listed_or_counted() -> None:
    assert read({**R1, "moe_layer_freq": 2, "num_hidden_layers": 8}).dense_layers == {0, 1, 2, 3, 5, 7}
    kinds = ["dense", "sparse", "dense", "sparse"]
    assert read({**R1, "mlp_layer_types": kinds, "num_hidden_layers": 4}).dense_layers == {0, 2}


GLM5 = {**R1, "architectures": ["GlmMoeDsaForCausalLM"], "num_hidden_layers": 6, "rope_scaling": None}


@pytest.mark.parametrize(
    ("values", "sources"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"index_topk_freq": 3}, [0, 1, 1, 1, 4, 4, 6]),
        ({"index_topk_pattern": "FSSFFS"}, [0, 0, 0, 3, 4, 4, 6]),
        ({"indexer_types": ["full", "full", "shared", "shared", "full", "shared"]}, [0, 1, 1, 1, 4, 4, 6]),
    ],
)
def test_layers_share_the_selection_of_the_last_that_made_one(values: dict[str, object], sources: list[int]) -> None:
    """The seventh layer is for drafting."""
    selections = read({**GLM5, **values}).selections
    assert [selection and selection.source for selection in selections] == sources
    assert [selection and selection.indexer is not None for selection in selections] == [
        index == source for index, source in enumerate(sources)
    ]


def test_indexers_differ_in_how_dims_are_paired() -> None:
    v32 = read({**R1, "architectures": ["DeepseekV32ForCausalLM"]}).selections[0]
    glm, told = read(GLM5).selections[0], read({**GLM5, "indexer_rope_interleave": False}).selections[0]
    assert [s and s.indexer and s.indexer.is_rope_interleaved for s in (v32, glm, told)] == [False, True, False]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**R1, "scoring_func": "softmax"}, "scoring_func"),
        ({**R1, "topk_method": "greedy"}, "topk_method"),
        ({**R1, "kv_lora_rank": None}, "kv_lora_rank"),
        ({**R1, "mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({**GLM5, "q_lora_rank": None}, "q_lora_rank"),
        ({**GLM5, "indexer_types": ["shared"] * 6}, "indexer_types"),
        ({**GLM5, "index_topk_pattern": "FSXFFS"}, "index_topk_pattern"),
        ({**R1, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc"}, "scoring_func|topk_method"),
    ],
)
def test_what_cannot_run_is_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(values)
