"""What automatic choices are based on: facts about the hardware and the model, as plain numbers. Takes no decisions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atom_cluster.config.hf_values import language_model_values, longest_context
from atom_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformFacts:
    """The hardware of the cluster, as far as choices depend on it."""

    vendor: Literal["cpu", "cuda", "rocm"]
    """What GPUs there are; cpu when none."""
    num_gpus: int
    """GPUs of the whole cluster."""
    num_cores: int
    """CPU cores of one node that our processes may use."""
    is_single_host: bool
    """True only if every replica is known to be on one host, now and later."""


_UNEVEN_KEYS = (
    "kv_lora_rank",
    "sliding_window",
    "sliding_window_size",
    "hybrid_layer_pattern",
    "full_attention_interval",
    "linear_num_key_heads",
)
"""Keys of models whose layers keep something else than keys and values of all positions, equally many each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenKv:
    """KV of a model whose layers all keep keys and values of every position, of the same sizes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, *, element_bytes: int, num_ranks: int) -> int:
        """KV bytes of one token on the rank that holds most. Heads that do not divide evenly are rounded up."""
        heads_per_rank = -(-self.num_kv_heads // num_ranks)
        return 2 * self.num_layers * heads_per_rank * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What config.json of a model says, as far as choices depend on it."""

    dtype: str | None
    """Precision of the checkpoint, such as `bfloat16`; None when not told."""
    max_positions: int
    """Longest context, in tokens, that the model was made for."""
    kv: EvenKv | None
    """None: only the engine can tell what its layers keep."""

    @classmethod
    def from_config(cls, config: dict[str, object]) -> ModelFacts:
        """Facts in a parsed config.json, of both key spellings. Raises ConfigError naming a missing or wrong key.

        Of a model for more than text, those of its language model.
        """
        config = language_model_values(config)
        dtype = config.get("dtype", config.get("torch_dtype"))
        return cls(
            dtype=dtype if isinstance(dtype, str) else None,
            max_positions=longest_context(config) or _integer(config, "max_position_embeddings"),
            kv=_even_kv(config),
        )


def _even_kv(config: dict[str, object]) -> EvenKv | None:
    num_layers, num_heads = _integer(config, "num_hidden_layers"), _integer(config, "num_attention_heads")
    layer_types = config.get("layer_types")
    is_mixed = isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types)
    if is_mixed or any(config.get(key) is not None for key in _UNEVEN_KEYS):
        return None
    has_head_dim = config.get("head_dim") is not None
    has_kv_heads = config.get("num_key_value_heads") is not None
    return EvenKv(
        num_layers=num_layers,
        num_kv_heads=_integer(config, "num_key_value_heads") if has_kv_heads else num_heads,
        head_dim=_integer(config, "head_dim") if has_head_dim else _integer(config, "hidden_size") // num_heads,
    )


def read_model_facts(model_dir: Path) -> ModelFacts:
    """Facts about the model in a local directory. Raises ConfigError when config.json is absent or unusable."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    try:
        return ModelFacts.from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _integer(config: dict[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"`{key}` should be a positive integer, and is {value!r}")
    return value
