"""quant_method `compressed-tensors`: groups of layers, each with number, scales and input quantization of its own."""

from __future__ import annotations

import re
from typing import Literal

from atom_cluster.ops.quantized import InputQuantization
from atom_cluster.quantization.eight_bit import EightBit
from atom_cluster.quantization.microscaling import GROUP_SIZE, Mxfp4
from atom_cluster.quantization.names import is_listed
from atom_cluster.quantization.packed_int import PackedInt
from atom_cluster.quantization.quantized import QuantizedScheme
from atom_cluster.quantization.rules import ConfigSection, SchemeRules, excluded_by, require_flag

_FORMATS = (
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_LAYER_CLASS = "Linear"
_E8M0 = "torch.uint8"
_SIZES_BEFORE_PACKING = (r".*\.weight_shape",)
"""They follow from the model."""


def read_compressed_tensors(section: ConfigSection) -> SchemeRules:
    """The first group that names a layer counts, then the first whose target is the class of linear layers.

    `quantization_status` is not looked at: whether weights are compressed, names and dtypes of tensors tell.
    """
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.require("format", "dense", default="dense")
    groups = section.section("config_groups")
    if groups is None:
        raise section.error("config_groups", "is missing")
    rules: list[tuple[tuple[str, ...], QuantizedScheme]] = []
    for key in groups.values:
        group = groups.section(key)
        if group is None:
            raise groups.error(key, "is empty")
        layout = group.text("format", section.text("format", ""))
        rules.append((group.strings("targets") or (), _scheme(group, layout)))
    excluded = excluded_by(section, "ignore")

    def choose(name: str) -> QuantizedScheme | None:
        if is_listed(name, excluded):
            return None
        named = (scheme for targets, scheme in rules if is_listed(name, targets))
        of_class = (scheme for targets, scheme in rules if _LAYER_CLASS in targets)
        return next(named, next(of_class, None))

    return SchemeRules(choose, ignored=_SIZES_BEFORE_PACKING)


def _scheme(group: ConfigSection, layout: str) -> QuantizedScheme:
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", "is missing: quantizing inputs alone is not supported")
    if layout not in _FORMATS:
        raise group.error("format", f"{layout!r} is not supported (supported: {', '.join(_FORMATS)})")
    if layout == "pack-quantized":
        return _packed(group, weights)
    inputs = _inputs(group)
    if layout == "mxfp4-pack-quantized":
        weights.require("num_bits", 4)
        weights.require("group_size", GROUP_SIZE)
        return Mxfp4(inputs=inputs, codes_name="weight_packed", scale_name="weight_scale")
    return _eight_bit(weights, inputs)


def _eight_bit(weights: ConfigSection, inputs: InputQuantization | None) -> EightBit:
    weights.require("num_bits", 8)
    weights.require("type", "float", "int", default="int")
    require_flag(weights, "symmetric", is_set=True)
    weights.require("strategy", "tensor", "channel", "group", "block", default="tensor")
    granularity: Literal["tensor", "channel"] | tuple[int, int]
    strategy = weights.text("strategy", "tensor")
    if strategy == "block":
        granularity = _block(weights)
    elif strategy == "group":
        granularity = (1, weights.integer("group_size"))
    else:
        granularity = "tensor" if strategy == "tensor" else "channel"
    return EightBit(
        number=_number(weights), granularity=granularity, inputs=inputs, is_e8m0=weights.get("scale_dtype") == _E8M0
    )


def _block(weights: ConfigSection) -> tuple[int, int]:
    """`block_structure`: a list, or text such as `128x128`."""
    value = weights.get("block_structure")
    if isinstance(value, str):
        sizes = tuple(map(int, value.split("x"))) if re.fullmatch(r"\d+x\d+", value) else ()
    else:
        sizes = weights.integers("block_structure")
    if len(sizes) != 2 or min(sizes) < 1:
        raise weights.error("block_structure", f"must be two positive integers, got {value!r}")
    return sizes[0], sizes[1]


def _packed(group: ConfigSection, weights: ConfigSection) -> PackedInt:
    weights.require("num_bits", 4, 8)
    weights.require("type", "int", default="int")
    weights.require("strategy", "channel", "group", default="channel")
    if weights.get("actorder") is not False:
        weights.require("actorder", "group", "static", "weight", default="static")
    if "input_activations" in group:
        raise group.error("input_activations", "must be null: inputs of pack-quantized weights are used as they are")
    is_grouped = weights.get("strategy") == "group"
    return PackedInt(
        num_bits=weights.integer("num_bits"),
        group_size=weights.integer("group_size") if is_grouped else None,
        has_zero=not weights.flag("symmetric", default=True),
        has_group_index=weights.get("actorder") == "group",
    )


def _inputs(group: ConfigSection) -> InputQuantization | None:
    """How a group rounds its inputs. One scale per batch, if the config has that, becomes one per token.

    So what a request gets does not depend on which others it is computed with.
    """
    inputs = group.section("input_activations")
    if inputs is None:
        return None
    inputs.require("num_bits", 4, 8)
    require_flag(inputs, "symmetric", is_set=True)
    inputs.require("strategy", "tensor", "token", "group", "tensor_group", default="tensor")
    is_static = not inputs.flag("dynamic")
    if is_static:
        inputs.require("strategy", "tensor", default="tensor")
    is_grouped = "group" in inputs.text("strategy", "tensor")
    is_e8m0 = inputs.get("scale_dtype") == _E8M0 or inputs.get("num_bits") == 4
    return InputQuantization(
        number="float4" if inputs.get("num_bits") == 4 else _number(inputs),
        group_size=inputs.integer("group_size") if is_grouped else None,
        scale_format="e8m0" if is_e8m0 else "float32",
        is_static=is_static,
    )


def _number(section: ConfigSection) -> Literal["float8", "int8"]:
    return "float8" if section.get("type") == "float" else "int8"
