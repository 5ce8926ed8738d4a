"""quant_method `quark`: one configuration for all layers, others for some by name."""

from __future__ import annotations

from typing import Literal

from atom_cluster.ops.quantized import InputQuantization
from atom_cluster.quantization.eight_bit import EightBit
from atom_cluster.quantization.microscaling import GROUP_SIZE, Mxfp4
from atom_cluster.quantization.names import is_listed, is_meant
from atom_cluster.quantization.quantized import QuantizedScheme
from atom_cluster.quantization.rules import ConfigSection, SchemeRules, excluded_by, require_flag

_EIGHT_BIT: dict[object, Literal["float8", "int8"]] = {"fp8_e4m3": "float8", "int8": "int8"}
_FLOAT4 = "fp4"
_ZEROS_OF_SYMMETRIC = (r".*\.(?:weight|input|output)_zero_point",)


def read_quark(section: ConfigSection) -> SchemeRules:
    """`layer_quant_config` counts before `global_quant_config`, `exclude` before both."""
    if section.get("layer_type_quant_config"):
        raise section.error("layer_type_quant_config", "is not supported (supported: by name, in layer_quant_config)")
    default = section.section("global_quant_config")
    by_name = section.section("layer_quant_config")
    rules = [(pattern, _scheme_or_none(by_name.section(pattern))) for pattern in by_name.values] if by_name else []
    base = _scheme_or_none(default)
    excluded = excluded_by(section, "exclude")

    def choose(name: str) -> QuantizedScheme | None:
        if is_listed(name, excluded):
            return None
        return next((scheme for pattern, scheme in rules if is_meant(name, pattern)), base)

    return SchemeRules(choose, ignored=_ZEROS_OF_SYMMETRIC)


def _scheme_or_none(config: ConfigSection | None) -> QuantizedScheme | None:
    weight = None if config is None else config.section("weight")
    if config is None or weight is None:
        return None
    weight.require("dtype", *_EIGHT_BIT, _FLOAT4)
    require_flag(weight, "is_dynamic", is_set=False)
    require_flag(weight, "symmetric", is_set=True)
    inputs = _inputs(config.section("input_tensors"))
    is_e8m0 = weight.get("scale_format") == "e8m0"
    if weight.get("dtype") == _FLOAT4:
        weight.require("qscheme", "per_group")
        weight.require("group_size", GROUP_SIZE)
        weight.require("scale_format", "e8m0")
        return Mxfp4(inputs=inputs, codes_name="weight", scale_name="weight_scale")
    weight.require("qscheme", "per_tensor", "per_channel", "per_group")
    if weight.get("qscheme") == "per_channel":
        weight.require("ch_axis", 0, default=0)
    granularities: dict[object, Literal["tensor", "channel"]] = {"per_tensor": "tensor", "per_channel": "channel"}
    is_grouped = weight.get("qscheme") == "per_group"
    return EightBit(
        number=_EIGHT_BIT[weight.get("dtype")],
        granularity=(1, weight.integer("group_size")) if is_grouped else granularities[weight.get("qscheme")],
        inputs=inputs,
        has_flat_scale=True,
        is_e8m0=is_e8m0,
    )


def _inputs(config: ConfigSection | None) -> InputQuantization | None:
    if config is None:
        return None
    config.require("dtype", *_EIGHT_BIT, _FLOAT4)
    require_flag(config, "symmetric", is_set=True)
    config.require("qscheme", "per_tensor", "per_channel", "per_group", default="per_tensor")
    is_static = not config.flag("is_dynamic")
    if is_static:
        config.require("qscheme", "per_tensor", default="per_tensor")
    # per_channel of inputs, which are [tokens, inputs], is one scale per token.
    return InputQuantization(
        number="float4" if config.get("dtype") == _FLOAT4 else _EIGHT_BIT[config.get("dtype")],
        group_size=config.integer("group_size") if config.get("qscheme") == "per_group" else None,
        scale_format="e8m0" if config.get("scale_format") == "e8m0" else "float32",
        is_static=is_static,
    )
