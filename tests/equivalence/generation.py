"""One way to run the same requests through differently configured engines, so that their outputs can be compared.

Everything is computed in float64 on tiny random models: rounding cannot flip a near-tie there, so equal means equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.speculative import SpeculativeConfig
from tests.tiny_models import TINY_MODELS, random_tokens, tiny_model_dir

_VARIANTS = {
    "llama_tied_bias",
    "llama_linear",
    "llama_yarn",
    "llama_one_kv_head",
    "llama_real_heads",
    "qwen2_windows",
    "deepseek_v3_dense",
    "gemma3_vision",
    "qwen3_5_vision",
    "qwen3_5_moe_vision",
}

FAMILIES = tuple(name for name in TINY_MODELS if name not in _VARIANTS)
"""One tiny model of every kind that is computed in its own way."""

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=16)
FREE = SamplingParams(temperature=1.3, seed=11, max_tokens=13, ignore_eos=True)
PENALIZED = SamplingParams(
    temperature=0.8, top_k=50, repetition_penalty=1.2, frequency_penalty=0.5, seed=4, max_tokens=16, ignore_eos=True
)

Request = tuple[list[int], SamplingParams]


def mixed_requests() -> list[Request]:
    """Eight requests of different lengths and kinds of sampling."""
    kinds = (GREEDY, SAMPLED, FREE, PENALIZED)
    return [(random_tokens(5 + 9 * i, seed=i), kinds[i % len(kinds)]) for i in range(8)]


def make_engine(model: str, **options: object) -> LLMEngine:
    """An engine on a tiny model, with blocks of 8 tokens."""
    settings: dict[str, object] = {
        "dtype": "float64",
        "device": "cpu",
        "block_size": 8,
        "num_blocks": 128,
        "max_num_requests": 16,
        "max_num_batched_tokens": 1024,
        "max_model_len": 256,
        "num_threads": 1,
        **options,
    }
    return LLMEngine(tiny_model_dir(model), **settings)  # type: ignore[arg-type]


def generate(model: str, requests: Sequence[Request], **options: object) -> list[list[int]]:
    """Output tokens of requests that are all there from the start."""
    with make_engine(model, **options) as engine:
        outputs = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    return [output["token_ids"] for output in outputs]


def generate_drafting(
    directory: Path, requests: Sequence[Request], *, num_tokens: int, **options: object
) -> list[list[int]]:
    """Output of the requests by one engine, with so many drafts after each token; 0: without speculation."""
    with open_drafting(directory, num_tokens=num_tokens, **options) as engine:
        outputs = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    return [output["token_ids"] for output in outputs]


def open_drafting(directory: Path, *, num_tokens: int, **options: object) -> LLMEngine:
    """That engine."""
    settings: dict[str, object] = {
        "dtype": "float64",
        "device": "cpu",
        "block_size": 8,
        "num_blocks": 128,
        "max_num_requests": 16,
        "max_model_len": 112,
        "num_threads": 1,
        "speculative": SpeculativeConfig(method="mtp", num_tokens=num_tokens) if num_tokens else None,
        **options,
    }
    return LLMEngine(directory, **settings)  # type: ignore[arg-type]
