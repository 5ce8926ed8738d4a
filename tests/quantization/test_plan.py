"""Which scheme each layer gets from the configs that checkpoints of the hub have, and what is refused by name."""

from __future__ import annotations

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.quantization.names import is_meant
from atom_cluster.quantization.plan import read_plan
from atom_cluster.quantization.scheme import QuantizationPlan
from atom_cluster.quantization.unquantized import NOTHING_QUANTIZED, UNQUANTIZED
from tests.quantization.formats import FORMATS, compressed, number, quark

QKV = "model.layers.3.self_attn.q_proj"
UP = "model.layers.3.mlp.up_proj"


def plan(config: dict[str, object] | None, stored: frozenset[str] = frozenset()) -> QuantizationPlan:
    values: dict[str, object] = {} if config is None else {"quantization_config": config}
    return read_plan(HfConfig(values), stored)


def with_changes(form: str, **changes: object) -> dict[str, object]:
    return {**FORMATS[form].config, **changes}


def test_without_a_config_nothing_is_quantized() -> None:
    assert plan(None) is NOTHING_QUANTIZED


@pytest.mark.parametrize("form", FORMATS)
def test_linear_layers_have_the_configured_scheme(form: str) -> None:
    assert plan(FORMATS[form].config).linear(QKV) is not UNQUANTIZED
    assert plan(FORMATS[form].config).linear(QKV).name == plan(FORMATS[form].config).linear(UP).name


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("fp8_block", {"modules_to_not_convert": ["lm_head", "model.layers.3.self_attn"]}),
        ("fp8_static", {"ignored_layers": [QKV]}),
        ("ct_int4", {"ignore": [QKV]}),
        ("ct_int4", {"ignore": [r"re:.*self_attn\..*"]}),
        ("quark_ptpc", {"exclude": ["*self_attn*"]}),
        ("quark_mxfp4", {"layer_quant_config": {"*q_proj": {"weight": None}}}),
        ("awq", {"modules_to_not_convert": ["self_attn"]}),
        ("gptq", {"dynamic": {r"-:.*\.self_attn\.": {}}}),
    ],
)
def test_what_a_config_excludes_is_plain(form: str, changes: dict[str, object]) -> None:
    found = plan(with_changes(form, **changes))
    assert found.linear(QKV) is UNQUANTIZED
    assert found.linear(UP) is not UNQUANTIZED


def test_gpt_oss_quantizes_experts_alone() -> None:
    found = plan({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    assert found.linear("model.layers.0.mlp.experts.gate_up_proj") is not UNQUANTIZED
    assert found.linear(QKV) is UNQUANTIZED
    assert found.linear(UP) is UNQUANTIZED


def test_a_layer_that_is_stored_as_floats_is_plain_though_no_list_says_so() -> None:
    stored = frozenset({"model.layers.61.eh_proj.weight", f"{QKV}.weight", f"{QKV}.weight_scale_inv"})
    found = plan(FORMATS["fp8_block"].config, stored)
    assert found.linear("model.layers.61.eh_proj") is UNQUANTIZED
    assert found.linear(QKV) is not UNQUANTIZED
    # Absent altogether: loading will say what is missing.
    assert found.linear(UP) is not UNQUANTIZED


def test_groups_by_name_come_before_the_class_and_may_have_formats_of_their_own() -> None:
    config = compressed("mixed-precision", {}, None)
    config["config_groups"] = {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": number(4, "int", "group", group_size=32),
        },
        "group_1": {
            "targets": ["re:.*self_attn.*"],
            "format": "float-quantized",
            "weights": number(8, "float", "channel"),
            "input_activations": number(8, "float", "token", dynamic=True),
        },
    }
    assert plan(config).linear(UP).name.startswith("int4")
    assert plan(config).linear(QKV).name.startswith("float8 per channel")


def test_layers_of_quark_and_gptq_may_differ() -> None:
    base = quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, {"dtype": "fp8_e4m3", "is_dynamic": False})
    assert isinstance(base["global_quant_config"], dict)
    base["layer_quant_config"] = {
        "*.up_proj": {**base["global_quant_config"], "weight": {"dtype": "int8", "qscheme": "per_channel"}}
    }
    assert plan(base).linear(QKV).name.startswith("float8 per tensor")
    assert plan(base).linear(UP).name.startswith("int8 per channel")
    found = plan(with_changes("gptq", dynamic={r"+:.*\.up_proj": {"bits": 8, "group_size": 64}}))
    assert found.linear(UP).name == "gptq int8, groups of 64, v1"
    assert found.linear(QKV).name == "gptq int4, groups of 32, v1"


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("fp8_block", {"fmt": "float8_e4m3fn"}),
        ("ct_int4", {"quantization_status": "frozen"}),
        ("ct_int4", {"quantization_status": None}),
    ],
)
def test_what_says_the_same_in_other_words_changes_nothing(form: str, changes: dict[str, object]) -> None:
    assert plan(with_changes(form, **changes)).linear(QKV).name == plan(FORMATS[form].config).linear(QKV).name


def test_blocks_may_be_spelt_as_text() -> None:
    as_list, as_text = (
        plan(compressed("float-quantized", number(8, "float", "block", block_structure=block), None))
        for block in ([128, 64], "128x64")
    )
    assert as_text.linear(QKV).name == as_list.linear(QKV).name == "float8 per 128x64"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method 'bitsandbytes' is not supported \(supported: fp8, "),
        (with_changes("awq", bits=3), "quantization_config: bits 3 is not supported"),
        (with_changes("awq", version="gemv"), "version 'gemv'"),
        (with_changes("awq", zero_point=False), "zero_point False"),
        (with_changes("gptq", bits=2), "bits 2"),
        (with_changes("gptq", lm_head=True), "lm_head"),
        (with_changes("gptq", dynamic={"+:.*up_proj": {"bits": 3}}), r"dynamic: \+:\.\*up_proj: bits 3"),
        (with_changes("fp8_block", weight_block_size=[128]), "weight_block_size must be two"),
        (with_changes("fp8_block", activation_scheme="static"), "activation_scheme must be dynamic"),
        (with_changes("ct_int4", format="nvfp4-pack-quantized"), "group_0: format 'nvfp4-pack-quantized'"),
        (with_changes("ct_int4", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: format"),
        (compressed("pack-quantized", number(2, "int", "channel"), None), "weights: num_bits 2"),
        (compressed("float-quantized", number(8, "float", "attn_head"), None), "strategy 'attn_head'"),
        (compressed("float-quantized", number(8, "float", "block", block_structure="128"), None), "got '128'"),
        (quark({"dtype": "fp6_e3m2", "qscheme": "per_group"}, None), "global_quant_config: weight: dtype 'fp6_e3m2'"),
        (with_changes("quark_ptpc", layer_type_quant_config={"Linear": {}}), "layer_type_quant_config"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.", "model.layers.10.mlp.up_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("*down_proj", "model.layers.7.mlp.down_proj", True),
        ("re:.*down", "model.layers.7.mlp.down_proj", True),
        ("re:down", "model.layers.7.mlp.down_proj", False),
    ],
)
def test_patterns_mean_whole_components_or_regular_expressions(pattern: str, name: str, expected: bool) -> None:
    assert is_meant(name, pattern) is expected
