"""Which model, in what precision, and how its weights are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class ModelOptions(FrozenConfig):
    """Everything about the model except its name."""

    served_name: str | None = None
    """Name clients use; the last part of `model` when None."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute and KV precision. auto: the checkpoint's on GPUs, float32 on CPUs."""
    max_model_len: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Most tokens of prompt plus output. auto: the checkpoint's limit."""
    revision: str | None = None
    """Revision of a hub model; None is its main branch."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """dummy: seeded random weights of the configured shapes, for benchmarks."""
    seed: int = 0
    """Seed of dummy weights."""
