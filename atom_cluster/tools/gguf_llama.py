"""A GGUF file of a small Llama model becomes a Hugging Face directory: weights, tokenizer and configuration.

Only what the demo model needs: the llama architecture, tied embeddings, a byte-level BPE tokenizer with the `smollm`
pre-tokenizer. Everything else is refused. Knows nothing of where the file comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file

from atom_cluster.errors import WeightsError

_CONTROL_TOKEN = 3
_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf_file: Path, target: Path, report: Callable[[str], None]) -> None:
    """Write the model in `gguf_file` into the existing directory `target`, weights in bfloat16.

    `report` gets one line per stage. Raises WeightsError for a file that is not the kind of model described above.
    """
    reader = GGUFReader(gguf_file)
    architecture, pre_tokenizer = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    if (architecture, pre_tokenizer) != ("llama", "smollm"):
        raise WeightsError(f"{gguf_file.name}: unsupported model ({architecture}, pre-tokenizer {pre_tokenizer})")
    report(f"converting {len(reader.tensors)} tensors to bfloat16")
    _write_weights(reader, target / "model.safetensors")
    report("writing tokenizer and configuration")
    _write_json(target / "tokenizer.json", _tokenizer(reader))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(reader))
    _write_json(target / "config.json", _model_config(reader))
    _write_json(target / "generation_config.json", _special_token_ids(reader))
    (target / "chat_template.jinja").write_text(_field(reader, "tokenizer.chat_template"), encoding="utf-8")


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise WeightsError(f"the GGUF file has no `{key}`")
    return field.contents()


def _write_weights(reader: GGUFReader, path: Path) -> None:
    num_heads_by_kind = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in num_heads_by_kind:
            values = _undo_rotary_order(values, num_heads_by_kind[kind])
        tensors[_tensor_name(tensor.name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def _tensor_name(gguf_name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match and match[2] in _LAYER_TENSOR_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_TENSOR_NAMES[match[2]]}.weight"
    if gguf_name in _TENSOR_NAMES:
        return _TENSOR_NAMES[gguf_name]
    raise WeightsError(f"the GGUF file has an unexpected tensor `{gguf_name}`")


def _undo_rotary_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """GGUF interleaves the two halves of a head that rotate together; Hugging Face keeps them apart."""
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def _tokenizer(reader: GGUFReader) -> dict[str, Any]:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _field(reader, "tokenizer.ggml.merges")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], **flags}
            for index, kind in enumerate(kinds)
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        # The `smollm` pre-tokenizer isolates digits; a GGUF file says so by that name only.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "padding_side": "left",
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _model_config(reader: GGUFReader) -> dict[str, Any]:
    hidden_size = _field(reader, "llama.embedding_length")
    num_heads = _field(reader, "llama.attention.head_count")
    rope_theta = _field(reader, "llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # Stored as float32, where 1e-5 is 9.9999997e-6.
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # Both spellings: readers before and after the key was renamed.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        **_special_token_ids(reader),
    }


def _special_token_ids(reader: GGUFReader) -> dict[str, int]:
    return {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
