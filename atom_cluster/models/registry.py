"""Architecture name -> model class, and the one way to a loaded model. Knows no runner and no requests."""

from __future__ import annotations

import importlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.spec import ModelSpec
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertsOp
from atom_cluster.quantization.online import with_online
from atom_cluster.quantization.plan import read_plan
from atom_cluster.weights.dummy import fill_weights
from atom_cluster.weights.loader import check_fit, load_weights
from atom_cluster.weights.rules import CheckpointMap, LoadableModel
from atom_cluster.weights.safetensors_reader import Checkpoint, open_checkpoint

_log = logging.getLogger(__name__)

_LOG_PERIOD_S = 10.0

NO_ONLINE_QUANTIZATION = QuantizationConfig()


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family's code is, as `module:name` below `atom_cluster.models`; imported when used."""

    spec_reader: str
    """A function HfConfig -> its ModelSpec."""
    model: str
    """A class, built as `cls(spec, context, max_model_len=..., num_draft_layers=...)`."""


_LLAMA = Family("llama.spec:read_llama_spec", "llama.model:LlamaForCausalLM")
_QWEN3_NEXT = Family("qwen3_next.spec:read_qwen3_next_spec", "qwen3_next.model:Qwen3NextForCausalLM")
_QWEN3_5 = Family("qwen3_5.spec:read_qwen3_5_spec", "qwen3_5.model:Qwen3_5ForCausalLM")
_QWEN3_5_HUB = Family("qwen3_5.spec:read_qwen3_5_spec", "qwen3_5.model:Qwen3_5ForConditionalGeneration")
_MOE_DECODER = "moe_decoder.model:MoeDecoderForCausalLM"
_DEEPSEEK = "deepseek.model:DeepseekForCausalLM"
_QWEN_MOE = Family("qwen_moe.spec:read_qwen_moe_spec", _MOE_DECODER)
_OLMO = Family("olmo.spec:read_olmo_spec", "olmo.model:OlmoForCausalLM")

ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "DeepseekV2ForCausalLM": Family("deepseek.spec:read_deepseek_v2_spec", _DEEPSEEK),
    "DeepseekV3ForCausalLM": Family("deepseek.spec:read_deepseek_v3_spec", _DEEPSEEK),
    "DeepseekV32ForCausalLM": Family("deepseek.spec:read_deepseek_v32_spec", _DEEPSEEK),
    "DeepseekV4ForCausalLM": Family(
        "deepseek_v4.spec:read_deepseek_v4_spec", "deepseek_v4.model:DeepseekV4ForCausalLM"
    ),
    "Glm4MoeLiteForCausalLM": Family("deepseek.spec:read_glm4_moe_lite_spec", _DEEPSEEK),
    "GlmMoeDsaForCausalLM": Family("deepseek.spec:read_glm_moe_dsa_spec", _DEEPSEEK),
    "Gemma3ForCausalLM": Family("gemma3.spec:read_gemma3_spec", "gemma3.model:Gemma3ForCausalLM"),
    "Gemma3ForConditionalGeneration": Family(
        "gemma3.spec:read_gemma3_spec", "gemma3.model:Gemma3ForConditionalGeneration"
    ),
    "GptOssForCausalLM": Family("gpt_oss.spec:read_gpt_oss_spec", "gpt_oss.model:GptOssForCausalLM"),
    "MiMoV2FlashForCausalLM": Family("mimo_v2.spec:read_mimo_v2_spec", "mimo_v2.model:MimoV2ForCausalLM"),
    "Olmo2ForCausalLM": _OLMO,
    "Olmo3ForCausalLM": _OLMO,
    "MistralForCausalLM": _LLAMA,
    "MinistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Glm4MoeForCausalLM": Family("glm4_moe.spec:read_glm4_moe_spec", "glm4_moe.model:Glm4MoeForCausalLM"),
    "MiniMaxM2ForCausalLM": Family("minimax_m2.spec:read_minimax_m2_spec", _MOE_DECODER),
    "MixtralForCausalLM": Family("mixtral.spec:read_mixtral_spec", _MOE_DECODER),
    "Qwen2MoeForCausalLM": _QWEN_MOE,
    "Qwen3MoeForCausalLM": _QWEN_MOE,
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5_HUB,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_HUB,
}
"""By the first entry of `architectures` in config.json. Each has a parity test with transformers; a test sees to it."""


class LoadableCausalLM(CausalLM, LoadableModel, Protocol):
    """What registered classes are."""

    def parts(self) -> Iterator[Module]:
        """Direct parts, each of which can be loaded and finished by itself, in this order."""
        ...

    def linear_ops(self) -> Sequence[LinearOp | ExpertsOp]:
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
    quantization: QuantizationConfig = NO_ONLINE_QUANTIZATION,
) -> LoadableCausalLM:
    """The model in `model_dir` (HF layout), this rank's shard of it loaded and ready to run.

    dummy: `model_dir` needs only config.json; weights are random, equal for equal seeds and for any number of ranks.
    quantization: how a float checkpoint is quantized. It is loaded part by part then: beside the quantized model, the
    floats of one layer are in memory. Checkpoints that are quantized already are recognised by themselves.
    Raises ConfigError for a model that cannot run here, WeightsError for a checkpoint that does not fit it.
    """
    config = HfConfig.read(model_dir)
    spec = spec_from_config(config)
    sizes = {"max_model_len": max_model_len, "num_draft_layers": num_draft_layers}
    if load_format == "dummy":
        plan = with_online(read_plan(config), quantization, context.device)
        model = build_model(spec, replace(context, quantization=plan), **sizes)
        fill_weights(model, seed)
        model.finish_loading()
        return model
    with open_checkpoint(model_dir) as checkpoint:
        plan = with_online(read_plan(config, checkpoint.names), quantization, context.device)
        stored = replace(
            context,
            stored_dtypes={name: checkpoint.float_dtype(name) for name in checkpoint.names},
            quantization=plan,
        )
        model = build_model(spec, stored, **sizes)
        if quantization.online is None:
            load_weights(model, checkpoint)
            model.finish_loading()
        else:
            _load_part_by_part(model, checkpoint)
    return model


@dataclass(frozen=True, slots=True)
class _OnePart:
    """A part of a model as something to load: what else is in the checkpoint is for other parts."""

    part: Module

    def checkpoint_map(self) -> CheckpointMap:
        return CheckpointMap(parts=self.part.weight_parts(), ignored=(".*",))

    def finish_loading(self) -> None:
        self.part.finish_loading()


def _load_part_by_part(model: LoadableCausalLM, checkpoint: Checkpoint) -> None:
    """Each part is finished before the next one is read. Memory that nothing was loaded into yet costs nothing."""
    check_fit(model.checkpoint_map(), checkpoint)
    parts = list(model.parts())
    logged_s = 0.0
    for number, part in enumerate(parts):
        if time.monotonic() - logged_s >= _LOG_PERIOD_S:
            logged_s = time.monotonic()
            _log.info("reading and quantizing part %d of %d of %s", number + 1, len(parts), checkpoint.directory)
        one = _OnePart(part)
        load_weights(one, checkpoint, log_level=logging.DEBUG)
        one.finish_loading()


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
