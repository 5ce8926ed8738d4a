"""Tiny random checkpoints of real architectures, in HF layout, made with transformers. Built once per test session.

`tiny_model_dir("llama")` is a directory with config.json and model.safetensors, 0.1 million parameters. Parameters that
transformers initialises to constants (norms, biases) are perturbed, so that parity tests notice them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 256

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.08,
}


@dataclass(frozen=True)
class TinyModel:
    """Configuration of one tiny model, on top of the common values."""

    model_type: str
    architecture: str
    values: dict[str, object]


def _rope(rope_type: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


_LLAMA3 = _rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)

TINY_MODELS = {
    "llama": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_LLAMA3}),
    "llama_tied_bias": TinyModel(
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_rope("linear", factor=2.0)}),
    "llama_yarn": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_YARN}),
    "llama_one_kv_head": TinyModel(
        "llama", "LlamaForCausalLM", {"head_dim": 16, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE - 1}
    ),
    "qwen2": TinyModel("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": TinyModel("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
}


@cache
def tiny_model_dir(name: str, dtype: str = "float32", *, max_shard_size: str = "1GB") -> Path:
    """Directory of a checkpoint stored in `dtype`; a small `max_shard_size` ("100KB") gives several files."""
    directory = Path(_session_dir().name) / f"{name}-{dtype}-{max_shard_size}"
    model = _build(TINY_MODELS[name]).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@cache
def reference_model(name: str, dtype: str = "float32") -> PreTrainedModel:
    """transformers' model of the same checkpoint, computing in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_dir(name, dtype), dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def reference_logits(name: str, token_ids: list[int], dtype: str = "float32") -> torch.Tensor:
    """transformers' logits of all positions of one prompt, [tokens, vocabulary] float32."""
    logits: torch.Tensor = reference_model(name, dtype)(torch.tensor([token_ids])).logits[0]
    return logits


def random_tokens(num_tokens: int, seed: int = 7) -> list[int]:
    """Token ids above the special ones, below the smallest vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 1, (num_tokens,), generator=generator).tolist()


@cache
def _session_dir() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="atom-cluster-tiny-")


def _build(tiny: TinyModel) -> PreTrainedModel:
    config = AutoConfig.for_model(tiny.model_type, **{**_COMMON, **tiny.values})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
