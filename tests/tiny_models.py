"""Tiny random checkpoints of real architectures, in HF layout, made with transformers. Built once per test session.

`tiny_model_dir("llama")` is a directory with config.json and model.safetensors, 0.1 million parameters. Parameters that
transformers initialises to constants (norms, biases, buffers) are perturbed, so that parity tests notice them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

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
    tolerance: float = 1e-5
    """How far logits computed in float32 may be from transformers'."""


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

_MLA = {
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
}
_MLA_YARN = {**_YARN["rope_parameters"], "mscale": 1.0, "mscale_all_dim": 0.8}
_DEEPSEEK_V3 = {
    **_MLA,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "rope_parameters": _MLA_YARN,
}
# With few index heads all scores of a position may be zero, and ties are not broken alike everywhere.
_DSA = {"index_topk": 13, "index_head_dim": 16, "index_n_heads": 32}
_DEEPSEEK_V2 = {**_MLA, "first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 2}

_DEEPSEEK_V4 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 40,
    "rms_norm_eps": 1e-4,
    # transformers takes one key for the other.
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "swiglu_limit": 0.3,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "sliding_window": 10,
    "o_groups": 2,
    "o_lora_rank": 12,
    "index_topk": 5,
    "index_head_dim": 16,
    "index_n_heads": 32,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 4,
    "hc_eps": 1e-3,
    # A copy: transformers writes to it.
    "rope_parameters": {**_YARN["rope_parameters"]},
}

_GEMMA3 = {
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}

_GATED_DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "head_dim": 32,
    "num_hidden_layers": 4,
}
_GATED_DELTA_EXPERTS = {
    **_GATED_DELTA,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
GATED_DELTA_TOLERANCE = 5e-5
"""Its recurrence amplifies rounding: float32 and float64 differ by half of this in transformers, too."""

_TINY_VISION = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_MROPE = _rope("default", partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)

TINY_MODELS = {
    "llama": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_LLAMA3}),
    "llama_tied_bias": TinyModel(
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_rope("linear", factor=2.0)}),
    "llama_yarn": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 16, **_YARN}),
    "llama_real_heads": TinyModel("llama", "LlamaForCausalLM", {"head_dim": 64, "max_position_embeddings": 2048}),
    "llama_one_kv_head": TinyModel(
        "llama", "LlamaForCausalLM", {"head_dim": 16, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE - 1}
    ),
    "mistral": TinyModel("mistral", "MistralForCausalLM", {"head_dim": 24, "sliding_window": 11}),
    "ministral": TinyModel(
        "ministral",
        "MinistralForCausalLM",
        {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2_windows": TinyModel(
        "qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}
    ),
    "deepseek_v4": TinyModel("deepseek_v4", "DeepseekV4ForCausalLM", _DEEPSEEK_V4),
    "gemma3": TinyModel("gemma3_text", "Gemma3ForCausalLM", _GEMMA3),
    "gemma3_vision": TinyModel(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_COMMON, **_GEMMA3},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
            },
        },
    ),
    "olmo2": TinyModel("olmo2", "Olmo2ForCausalLM", {}),
    "olmo3": TinyModel(
        "olmo3",
        "Olmo3ForCausalLM",
        {
            "num_key_value_heads": 1,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": _YARN["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "gpt_oss": TinyModel(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "intermediate_size": 96,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 10,
            "swiglu_limit": 0.4,
            **_rope("yarn", factor=32.0, truncate=False, original_max_position_embeddings=16, rope_theta=150000.0),
        },
    ),
    "mimo_v2": TinyModel(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "v_head_dim": 16,
            "sliding_window": 9,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen2": TinyModel("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": TinyModel("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen2_moe": TinyModel(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek_v2": TinyModel(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **_DEEPSEEK_V2,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "num_hidden_layers": 3,
            "rope_parameters": {**_MLA_YARN, "mscale": 0.7},
        },
    ),
    "deepseek_v2_lite": TinyModel(
        "deepseek_v2", "DeepseekV2ForCausalLM", {**_DEEPSEEK_V2, "q_lora_rank": None, "attention_bias": True}
    ),
    "deepseek_v3": TinyModel("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK_V3),
    "deepseek_v3_dense": TinyModel(
        "deepseek_v3", "DeepseekV3ForCausalLM", {**_DEEPSEEK_V3, "first_k_dense_replace": 3}
    ),
    "kimi_k2": TinyModel(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**_DEEPSEEK_V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "attention_bias": True},
    ),
    "glm4_moe_lite": TinyModel(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {
            **_DEEPSEEK_V3,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "mlp_layer_types": ["dense", "sparse", "dense"],
            **_rope("default"),
        },
    ),
    "deepseek_v32": TinyModel("deepseek_v32", "DeepseekV32ForCausalLM", {**_DEEPSEEK_V3, **_DSA}),
    "glm_moe_dsa": TinyModel(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        {
            **_DEEPSEEK_V3,
            **_DSA,
            "n_group": 1,
            "topk_group": 1,
            "num_hidden_layers": 4,
            "indexer_types": ["full", "shared", "full", "shared"],
            **_rope("default"),
        },
    ),
    "qwen3_moe": TinyModel(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    ),
    "mixtral": TinyModel(
        "mixtral",
        "MixtralForCausalLM",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    ),
    "minimax_m2": TinyModel(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            "intermediate_size": 48,
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "partial_rotary_factor": 0.5,
        },
    ),
    "glm4_moe": TinyModel(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 24,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "qwen3_next": TinyModel(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**_GATED_DELTA_EXPERTS, "mlp_only_layers": [1]},
        GATED_DELTA_TOLERANCE,
    ),
    "qwen3_5": TinyModel("qwen3_5_text", "Qwen3_5ForCausalLM", _GATED_DELTA, GATED_DELTA_TOLERANCE),
    "qwen3_5_moe": TinyModel(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", {**_GATED_DELTA_EXPERTS, **_MROPE}, GATED_DELTA_TOLERANCE
    ),
    "qwen3_5_vision": TinyModel(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**_COMMON, **_GATED_DELTA, **_MROPE}, "vision_config": _TINY_VISION},
        GATED_DELTA_TOLERANCE,
    ),
    "qwen3_5_moe_vision": TinyModel(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": {**_COMMON, **_GATED_DELTA_EXPERTS}, "vision_config": _TINY_VISION},
        GATED_DELTA_TOLERANCE,
    ),
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
    model_class: type[PreTrainedModel] = getattr(transformers, TINY_MODELS[name].architecture)
    return model_class.from_pretrained(tiny_model_dir(name, dtype), dtype=torch.float32).eval()


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
    model: PreTrainedModel = getattr(transformers, tiny.architecture)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            is_single = tensor.numel() == 1 and isinstance(tensor, torch.nn.Parameter)
            if tensor.is_floating_point() and (is_single or tensor.numel() > 1 and tensor.std() == 0):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # zero, too: each token's experts, no two of them the same
                ranked = torch.rand(len(table), tiny.values["n_routed_experts"], generator=generator).argsort(-1)
                table.copy_(ranked[:, : table.shape[1]])
        # The row of padding is zero, and so are its scores in an index: ties, which are not broken alike everywhere.
        embedding = model.get_input_embeddings().weight
        embedding[_COMMON["pad_token_id"]] = torch.randn(embedding.shape[1], generator=generator) * 0.08
    return model
