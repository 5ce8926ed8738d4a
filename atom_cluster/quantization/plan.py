"""From `quantization_config` of a config.json to a `QuantizationPlan`. Knows no layers and no files."""

from __future__ import annotations

from collections.abc import Callable

from atom_cluster.errors import ConfigError
from atom_cluster.quantization.compressed_tensors import read_compressed_tensors
from atom_cluster.quantization.float8_methods import read_fbgemm_fp8, read_fp8, read_fp8_and_fp4
from atom_cluster.quantization.integer_methods import read_awq, read_gptq
from atom_cluster.quantization.mxfp4_method import read_mxfp4
from atom_cluster.quantization.quark import read_quark
from atom_cluster.quantization.rules import ConfigSection, SchemeRules
from atom_cluster.quantization.scheme import LinearScheme, QuantizationPlan
from atom_cluster.quantization.unquantized import NOTHING_QUANTIZED, UNQUANTIZED

_METHODS: dict[str, Callable[[ConfigSection], SchemeRules]] = {
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm_fp8,
    "compressed-tensors": read_compressed_tensors,
    "quark": read_quark,
    "mxfp4": read_mxfp4,
    "awq": read_awq,
    "gptq": read_gptq,
}

_KV_SCALES = (
    r".*\.self_attn\.(?:attn\.|[qkv]_proj\.)?(?:q|k|v|kv|prob)_scale",
    r".*\.self_attn\.[qkv]_proj\.output_scale",
)
"""Scales for a cache of keys and values in float8. Attention takes those that it needs."""


class CheckpointPlan:
    """Schemes as the configuration says, unless the checkpoint shows that a layer was left as it was."""

    def __init__(self, rules: SchemeRules, stored_names: frozenset[str]) -> None:
        self._rules = rules
        self._stored_names = stored_names
        self.ignored = (*_KV_SCALES, *rules.ignored)

    def linear(self, name: str) -> LinearScheme:
        """Plain floats too for a layer that no list mentions and that is stored as such, as `eh_proj` of DeepSeek."""
        scheme = self._rules.choose(name)
        if scheme is None or self._is_stored_plain(name, scheme.mark):
            return UNQUANTIZED
        return scheme

    def _is_stored_plain(self, name: str, mark: str) -> bool:
        stored = self._stored_names
        is_plain = f"{name}.weight" in stored or name in stored
        return is_plain and f"{name}.{mark}" not in stored and f"{name}_{mark}" not in stored


def read_plan(config: ConfigSection, stored_names: frozenset[str] = frozenset()) -> QuantizationPlan:
    """The plan of a checkpoint with this config.json and these tensors (empty: not known).

    Raises ConfigError naming the key, or the layer, whose format is not supported.
    """
    key = "compression_config" if "compression_config" in config else "quantization_config"
    section = config.section(key)
    if section is None:
        return NOTHING_QUANTIZED
    method = section.text("quant_method", "")
    if method not in _METHODS:
        raise section.error("quant_method", f"{method!r} is not supported (supported: {', '.join(_METHODS)})")
    if "lm_head" in section and section.flag("lm_head"):
        raise ConfigError(f"config.json: {key}: lm_head is quantized, and only linear layers before it may be")
    expert_dtype = config.text("expert_dtype", section.text("expert_dtype", ""))
    if method == "fp8" and (expert_dtype or any(name.endswith(".scale") for name in stored_names)):
        config.require("expert_dtype", "fp4", "fp8", default="fp8")
        return CheckpointPlan(read_fp8_and_fp4(section, expert_dtype), stored_names)
    return CheckpointPlan(_METHODS[method](section), stored_names)
