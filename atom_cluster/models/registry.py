"""Architecture name -> model class, and the one way to a loaded model. Knows no runner and no requests."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, cast

from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.linear import LinearOp
from atom_cluster.weights.dummy import fill_weights
from atom_cluster.weights.loader import load_weights, storage_dtype
from atom_cluster.weights.rules import LoadableModel
from atom_cluster.weights.safetensors_reader import open_checkpoint

ARCHITECTURES = {
    "LlamaForCausalLM": "atom_cluster.models.llama.model:LlamaForCausalLM",
    "Qwen2ForCausalLM": "atom_cluster.models.llama.model:LlamaForCausalLM",
    "Qwen3ForCausalLM": "atom_cluster.models.llama.model:LlamaForCausalLM",
}
"""`module:class`, imported when used. Each one has a parity test against transformers; a test sees to that."""


class LoadableCausalLM(CausalLM, LoadableModel, Protocol):
    """What registered classes are, built as `cls(spec, context, max_model_len=...)`."""

    @property
    def linear_ops(self) -> tuple[LinearOp, ...]:
        """Every matrix product of the model, prepared."""
        ...


def read_spec(model_dir: Path) -> ModelSpec:
    """The spec of the model in `model_dir`. Raises ConfigError when config.json is absent, damaged or unsupported."""
    path = model_dir / "config.json"
    try:
        hf_config = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    if not isinstance(hf_config, dict):
        raise ConfigError(f"{path} is not an object")
    spec = ModelSpec.from_config(hf_config)
    _class_path(spec.architecture)
    return spec


def build_model(spec: ModelSpec, context: LayerContext, *, max_model_len: int) -> LoadableCausalLM:
    """A model with weights allocated but not loaded. `max_model_len` bounds positions (sizes the rotary table).

    Raises ConfigError for an unknown architecture, or when its heads cannot be divided among the ranks.
    """
    module_name, _, class_name = _class_path(spec.architecture).partition(":")
    factory = cast("Callable[..., LoadableCausalLM]", getattr(importlib.import_module(module_name), class_name))
    return factory(spec, context, max_model_len=max_model_len)


def load_model(
    model_dir: Path,
    *,
    context: LayerContext,
    max_model_len: int,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    seed: int = 0,
) -> LoadableCausalLM:
    """The model in `model_dir` (HF layout), this rank's shard of it loaded and ready to run.

    dummy: `model_dir` needs only config.json; weights are random, equal for equal seeds and for any number of ranks.
    Raises ConfigError for a model that cannot run here, WeightsError for a checkpoint that does not fit it.
    """
    spec = read_spec(model_dir)
    if load_format == "dummy":
        model = build_model(spec, context, max_model_len=max_model_len)
        fill_weights(model, seed)
    else:
        with open_checkpoint(model_dir) as checkpoint:
            stored = replace(context, weight_dtype=storage_dtype(checkpoint, context.dtype))
            model = build_model(spec, stored, max_model_len=max_model_len)
            load_weights(model, checkpoint)
    model.finish_loading()
    return model


def describe_weights(model: LoadableCausalLM) -> str:
    """What the op backend made of the model's matrices, for the start-up log: `211 packed float16`."""
    counts = Counter(op.name for op in model.linear_ops)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _class_path(architecture: str) -> str:
    path = ARCHITECTURES.get(architecture)
    if path is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"architecture {architecture!r} is not supported (supported: {known})")
    return path
