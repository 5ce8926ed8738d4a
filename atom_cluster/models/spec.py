"""ModelSpec: what every model's configuration says, checked. Each family adds its own sizes to it.

Knows no tensors and no devices. Values that a config may leave out get the default that the model's definition gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from atom_cluster.config.hf_values import longest_context
from atom_cluster.models.hf_config import HfConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model, as far as all of them are alike."""

    architecture: str
    """First entry of `architectures`, a key of the registry."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    max_positions: int
    """Longest context, prompt plus output, that the model was made for."""
    has_tied_embeddings: bool
    checkpoint_dtype: str | None
    """What the configuration says its weights are stored in; None when it does not say."""
    eos_token_ids: tuple[int, ...]
    """From config.json; generation_config.json may have more."""
    bos_token_id: int | None
    num_draft_layers: int = 0
    """Layers for multi-token prediction that the checkpoint has behind the others."""


class CommonFields(TypedDict):
    """The fields of ModelSpec that are read alike for all models."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    max_positions: int
    has_tied_embeddings: bool
    checkpoint_dtype: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def common_fields(
    config: HfConfig,
    *,
    norm_eps_key: str = "rms_norm_eps",
    default_norm_eps: float = 1e-6,
    is_tied_by_default: bool = False,
) -> CommonFields:
    """Read them. Raises ConfigError naming the key that is missing or wrong."""
    return CommonFields(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=config.integer("num_hidden_layers"),
        norm_eps=config.number(norm_eps_key, default_norm_eps),
        max_positions=longest_context(config.values) or config.integer("max_position_embeddings"),
        has_tied_embeddings=config.flag("tie_word_embeddings", default=is_tied_by_default),
        checkpoint_dtype=config.dtype,
        eos_token_ids=config.integers("eos_token_id"),
        bos_token_id=next(iter(config.integers("bos_token_id")), None),
    )
