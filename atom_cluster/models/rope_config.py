"""Reads a model's rotary embedding from its HF configuration, in the old spelling and the new. Knows no tensors.

Old: top-level `rope_theta`, and `rope_scaling` {`type` or `rope_type`, factor, ...} or null.
New: `rope_parameters` {`rope_type`, `rope_theta`, factor, ...}; for models whose kinds of layers differ, one such
object per kind, as {`full_attention`: {...}, `sliding_attention`: {...}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from atom_cluster.errors import ConfigError
from atom_cluster.layers.rope_spec import RopeKind, RopeSpec
from atom_cluster.models.hf_config import HfConfig

_DEFAULT_THETA = 10000.0
_DEFAULT_BETA_FAST = 32.0
_DEFAULT_BETA_SLOW = 1.0


def read_rope(
    config: HfConfig,
    head_dim: int,
    *,
    label: str | None = None,
    default_theta: float = _DEFAULT_THETA,
    default_partial: float = 1.0,
) -> RopeSpec:
    """The rotary embedding that a configuration describes. Raises ConfigError for a kind that is not implemented.

    label: of the layers it is for, in configurations that tell several apart; without effect in others.
    """
    values = _merged_values(config.values, label)
    kind = _kind(values)
    rotary_dim = int(head_dim * _number(values, "partial_rotary_factor", default_partial))
    theta = _number(values, "rope_theta", default_theta)
    if kind == "default":
        return RopeSpec(kind=kind, theta=theta, rotary_dim=rotary_dim)
    factor = _number(values, "factor", None)
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, rotary_dim=rotary_dim, factor=factor)
    original = _number(values, "original_max_position_embeddings", _fallback_length(config.values))
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            rotary_dim=rotary_dim,
            factor=factor,
            original_max_positions=int(original),
            low_freq_factor=_number(values, "low_freq_factor", None),
            high_freq_factor=_number(values, "high_freq_factor", None),
        )
    return RopeSpec(
        kind=kind,
        theta=theta,
        rotary_dim=rotary_dim,
        factor=factor,
        original_max_positions=int(original),
        beta_fast=_number(values, "beta_fast", _DEFAULT_BETA_FAST),
        beta_slow=_number(values, "beta_slow", _DEFAULT_BETA_SLOW),
        attention_factor=_yarn_attention_factor(values, factor),
        has_truncated_ramp=values.get("truncate", True) is not False,
    )


def read_local_rope(
    config: HfConfig, head_dim: int, *, theta_key: str, default_theta: float, default_partial: float = 1.0
) -> RopeSpec:
    """Of `sliding_attention` layers. In the old spelling `theta_key` is theirs, and `rope_scaling` is not."""
    if "rope_parameters" in config:
        label = "sliding_attention"
        return read_rope(config, head_dim, label=label, default_theta=default_theta, default_partial=default_partial)
    rotary_dim = int(head_dim * config.number("partial_rotary_factor", default_partial))
    return RopeSpec(kind="default", theta=config.number(theta_key, default_theta), rotary_dim=rotary_dim)


def read_score_factor(config: HfConfig) -> float:
    """What latent attention's query-key products are multiplied by: yarn's temperature, for queries and for keys."""
    values = _merged_values(config.values, None)
    mscale_all_dim = _number(values, "mscale_all_dim", 0.0)
    if _kind(values) == "default" or mscale_all_dim == 0:
        return 1.0
    return _yarn_temperature(_number(values, "factor", None), mscale_all_dim) ** 2


def _merged_values(hf_config: Mapping[str, object], label: str | None) -> dict[str, object]:
    """All rope values in one dictionary, the more specific spelling winning."""
    top_level = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    values = {key: hf_config[key] for key in top_level if hf_config.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        nested = hf_config.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise ConfigError(f"config.json: {key} is not an object: {nested!r}")
        if label is not None and isinstance(nested.get(label), Mapping):
            nested = nested[label]
        values.update({name: value for name, value in nested.items() if value is not None})
    return values


def _kind(values: Mapping[str, object]) -> RopeKind:
    name = values.get("rope_type", values.get("type", "default"))
    for kind in get_args(RopeKind):
        if name == kind:
            return kind  # type: ignore[no-any-return]
    known = ", ".join(get_args(RopeKind))
    raise ConfigError(f"config.json: rope type {name!r} is not supported (supported: {known})")


def _number(values: Mapping[str, object], key: str, default: float | None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"config.json: rope value {key} must be a number, got {value!r}")
    return float(value)


def _fallback_length(hf_config: Mapping[str, object]) -> float | None:
    value = hf_config.get("max_position_embeddings")
    return float(value) if isinstance(value, (int, float)) else None


def _yarn_attention_factor(values: Mapping[str, object], factor: float) -> float:
    if "attention_factor" in values:
        return _number(values, "attention_factor", None)
    mscale = _number(values, "mscale", 0.0)
    mscale_all_dim = _number(values, "mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return _yarn_temperature(factor, mscale) / _yarn_temperature(factor, mscale_all_dim)
    return _yarn_temperature(factor, 1.0)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
