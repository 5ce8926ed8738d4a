"""Architecture name -> model class, and the one way to a loaded model. Knows no runner and no requests."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.linear import LinearOp
from atom_cluster.weights.dummy import fill_weights
from atom_cluster.weights.loader import load_weights, storage_dtype
from atom_cluster.weights.rules import LoadableModel
from atom_cluster.weights.safetensors_reader import open_checkpoint


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family's code is, as `module:name` below `atom_cluster.models`; imported when used."""

    spec_reader: str
    """A function HfConfig -> its ModelSpec."""
    model: str
    """A class, built as `cls(spec, context, max_model_len=..., num_draft_layers=...)`."""


_LLAMA = Family("llama.spec:read_llama_spec", "llama.model:LlamaForCausalLM")

ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
}
"""By the first entry of `architectures` in config.json. Each has a parity test with transformers; a test sees to it."""


class LoadableCausalLM(CausalLM, LoadableModel, Protocol):
    """What registered classes are."""

    def linear_ops(self) -> Sequence[LinearOp]:
        """Every matrix product of the model, prepared."""
        ...


def read_spec(model_dir: Path) -> ModelSpec:
    """The spec of the model in `model_dir`. Raises ConfigError when config.json is absent, damaged or unsupported."""
    return spec_from_config(HfConfig.read(model_dir))


def spec_from_config(config: HfConfig) -> ModelSpec:
    """The spec that a configuration describes."""
    return cast("ModelSpec", _import(_family(config.architecture).spec_reader)(config))


def build_model(
    spec: ModelSpec, context: LayerContext, *, max_model_len: int, num_draft_layers: int = 0
) -> LoadableCausalLM:
    """A model with weights allocated but not loaded. `max_model_len` bounds positions (sizes the rotary table).

    Raises ConfigError for an unknown architecture, or when its heads cannot be divided among the ranks.
    """
    factory = _import(_family(spec.architecture).model)
    model = factory(spec, context, max_model_len=max_model_len, num_draft_layers=num_draft_layers)
    return cast("LoadableCausalLM", model)


def load_model(
    model_dir: Path,
    *,
    context: LayerContext,
    max_model_len: int,
    num_draft_layers: int = 0,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    seed: int = 0,
) -> LoadableCausalLM:
    """The model in `model_dir` (HF layout), this rank's shard of it loaded and ready to run.

    dummy: `model_dir` needs only config.json; weights are random, equal for equal seeds and for any number of ranks.
    Raises ConfigError for a model that cannot run here, WeightsError for a checkpoint that does not fit it.
    """
    spec = read_spec(model_dir)
    sizes = {"max_model_len": max_model_len, "num_draft_layers": num_draft_layers}
    if load_format == "dummy":
        model = build_model(spec, context, **sizes)
        fill_weights(model, seed)
    else:
        with open_checkpoint(model_dir) as checkpoint:
            dtype = storage_dtype(checkpoint, context.dtype)
            stored = replace(context, weight_dtype=dtype, stored_names=checkpoint.names)
            model = build_model(spec, stored, **sizes)
            load_weights(model, checkpoint)
    model.finish_loading()
    return model


def describe_weights(model: LoadableCausalLM) -> str:
    """What the op backend made of the model's matrices, for the start-up log: `211 packed float16`."""
    counts = Counter(op.name for op in model.linear_ops())
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _family(architecture: str) -> Family:
    family = ARCHITECTURES.get(architecture)
    if family is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"architecture {architecture!r} is not supported (supported: {known})")
    return family


def _import(path: str) -> Callable[..., object]:
    module_name, _, name = path.partition(":")
    return cast("Callable[..., object]", getattr(importlib.import_module(f"atom_cluster.models.{module_name}"), name))
