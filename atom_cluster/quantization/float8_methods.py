"""quant_method `fp8` (DeepSeek, Qwen3, MiniMax) and `fbgemm_fp8` (Llama 3.1 405B)."""

from __future__ import annotations

from dataclasses import replace

import torch

from atom_cluster.ops.quantized import InputQuantization
from atom_cluster.quantization.eight_bit import EightBit
from atom_cluster.quantization.microscaling import Mxfp4
from atom_cluster.quantization.names import is_listed
from atom_cluster.quantization.quantized import QuantizedScheme
from atom_cluster.quantization.rules import ConfigSection, SchemeRules, all_but, excluded_by

_EXPERTS = ("experts",)


def read_fp8(section: ConfigSection) -> SchemeRules:
    """`weight_block_size`: scales of blocks in `weight_scale_inv`; else one per tensor in `weight_scale`."""
    scheme, excluded = _read_fp8(section)
    return all_but(scheme, excluded)


def read_fp8_and_fp4(section: ConfigSection, expert_dtype: str) -> SchemeRules:
    """DeepSeek-V4: scales are exponents in `scale`, and with `expert_dtype` fp4 experts are MXFP4 with such scales."""
    scheme, excluded = _read_fp8(section)
    if scheme.inputs is None or not isinstance(scheme.granularity, tuple):
        raise section.error("weight_block_size", "must be two positive integers")
    scheme = replace(scheme, scale_name="scale", is_e8m0=True)
    if expert_dtype != "fp4":
        return all_but(scheme, excluded)
    of_experts = Mxfp4(inputs=scheme.inputs, codes_name="weight", codes_dtype=torch.int8, scale_name="scale")

    def choose(name: str) -> QuantizedScheme | None:
        if is_listed(name, excluded):
            return None
        return of_experts if is_listed(name, _EXPERTS) else scheme

    return SchemeRules(choose)


def _read_fp8(section: ConfigSection) -> tuple[EightBit, tuple[str, ...]]:
    """The scheme, and the layers that do not have it."""
    section.require("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    section.require("activation_scheme", "dynamic", "static", default="dynamic")
    section.require("scale_fmt", "ue8m0", "float", default="float")
    is_static = section.get("activation_scheme") == "static"
    excluded = excluded_by(section, "modules_to_not_convert", "ignored_layers")
    block = section.integers("weight_block_size")
    if not block:
        inputs = InputQuantization(number="float8", is_static=is_static)
        return EightBit(number="float8", granularity="tensor", inputs=inputs), excluded
    if len(block) != 2 or min(block) < 1:
        raise section.error("weight_block_size", f"must be two positive integers, got {block}")
    if is_static:
        raise section.error("activation_scheme", "must be dynamic with weight_block_size")
    inputs = InputQuantization(
        number="float8",
        group_size=block[1],
        scale_format="e8m0" if section.get("scale_fmt") == "ue8m0" else "float32",
    )
    granularity = (block[0], block[1])
    return EightBit(number="float8", granularity=granularity, inputs=inputs, scale_name="weight_scale_inv"), excluded


def read_fbgemm_fp8(section: ConfigSection) -> SchemeRules:
    """A scale per output; inputs are scaled per token, by no more than `activation_scale_ub` needs."""
    bound = section.number("activation_scale_ub", 1200.0)
    inputs = InputQuantization(number="float8", max_abs=bound)
    scheme = EightBit(number="float8", granularity="channel", inputs=inputs)
    rules = all_but(scheme, excluded_by(section, "modules_to_not_convert"))
    return SchemeRules(rules.choose, ignored=(r".*\.input_scale_ub",))
