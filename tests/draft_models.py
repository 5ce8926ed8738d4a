"""Tiny checkpoints with layers for multi-token prediction, of random numbers, as they lie on the hub.

`draft_model_dir("glm4_moe")` is the tiny model of `tiny_models.py` with such layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_model_dir

NUM_DRAFT_LAYERS = {
    "deepseek_v3": 1,
    "deepseek_v32": 1,
    "glm_moe_dsa": 1,
    "glm4_moe": 2,
    "qwen3_next": 1,
    "qwen3_5": 1,
    "qwen3_5_moe_vision": 1,
    "mimo_v2": 3,
}
"""Of every family that has any."""

MIMO_NORMS = ("enorm", "hnorm", "final_layernorm")
_HIDDEN_SIZE = 64

Tensors = dict[str, torch.Tensor]


@cache
def draft_model_dir(name: str) -> Path:
    """Directory of a checkpoint."""
    directory = Path(_session_dir().name) / name
    shutil.copytree(tiny_model_dir(name), directory)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    if name == "mimo_v2":
        config = _add_to_mimo(config, tensors)
    elif name.startswith("qwen3"):
        _add_under_mtp(config, tensors, has_stacked_experts=name == "qwen3_5_moe_vision")
    else:
        _append(config, tensors, NUM_DRAFT_LAYERS[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _append(config: dict[str, object], tensors: Tensors, num_layers: int) -> None:
    """Layers behind the last one, of its shapes, with an indexer of their own where the first layer has one.

    Their copies of embedding and head are of no use, which NaN in them shows.
    """
    first = int(str(config["num_hidden_layers"]))
    last = f"model.layers.{first - 1}."
    like_last = {key.removeprefix(last): value.shape for key, value in tensors.items() if key.startswith(last)}
    zeroth = "model.layers.0."
    indexer = {key.removeprefix(zeroth): x.shape for key, x in tensors.items() if f"{zeroth}self_attn.indexer" in key}
    norms = {f"{norm}.weight": (_HIDDEN_SIZE,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes = {**like_last, **indexer, **norms, "eh_proj.weight": (_HIDDEN_SIZE, 2 * _HIDDEN_SIZE)}
    generator = torch.Generator().manual_seed(3)
    for number in range(first, first + num_layers):
        prefix = f"model.layers.{number}."
        for key, shape in sorted(shapes.items()):
            tensors[prefix + key] = torch.randn(shape, generator=generator) * 0.1 + ("norm.weight" in key)
        tensors[f"{prefix}embed_tokens.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], torch.nan)
        tensors[f"{prefix}shared_head.head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    config["num_nextn_predict_layers"] = num_layers


def _add_under_mtp(config: dict[str, object], tensors: Tensors, *, has_stacked_experts: bool) -> None:
    """One layer named `mtp`, shaped like the last one, which has full attention; its experts stacked if so said."""
    last = next(key for key in tensors if "layers.3." in key).split("layers.3.")[0] + "layers.3."
    shapes = {key.replace(last, "mtp.layers.0."): value.shape for key, value in tensors.items() if last in key}
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    shapes |= {f"mtp.{norm}.weight": torch.Size((_HIDDEN_SIZE,)) for norm in norms}
    shapes["mtp.fc.weight"] = torch.Size((_HIDDEN_SIZE, 2 * _HIDDEN_SIZE))
    if has_stacked_experts:
        shapes = {key: shape for key, shape in shapes.items() if ".experts." not in key}
        shapes["mtp.layers.0.mlp.experts.gate_up_proj"] = torch.Size((8, 64, 64))
        shapes["mtp.layers.0.mlp.experts.down_proj"] = torch.Size((8, 64, 32))
    generator = torch.Generator().manual_seed(3)
    for key, shape in sorted(shapes.items()):
        tensors[key] = torch.randn(shape, generator=generator) * 0.1
    text = config.get("text_config", config)
    assert isinstance(text, dict)
    text |= {"mtp_num_hidden_layers": 1, "num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}


def _add_to_mimo(config: dict[str, object], tensors: Tensors) -> dict[str, object]:
    """Three layers named `model.mtp.layers`; the configuration gets the hub's keys."""
    dropped = ("layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps", "sliding_window")
    attention = {key[len("model.layers.1.") :]: x.shape for key, x in tensors.items() if "layers.1.self_attn" in key}
    dense = {key[len("model.layers.0.") :]: x.shape for key, x in tensors.items() if "layers.0.mlp" in key}
    norms = {f"{name}.weight": (_HIDDEN_SIZE,) for name in (*MIMO_NORMS, "input_layernorm", "pre_mlp_layernorm")}
    shapes = {**attention, **dense, **norms, "eh_proj.weight": (_HIDDEN_SIZE, 2 * _HIDDEN_SIZE)}
    generator = torch.Generator().manual_seed(3)
    for index in range(NUM_DRAFT_LAYERS["mimo_v2"]):
        for key, shape in sorted(shapes.items()):
            tensors[f"model.mtp.layers.{index}.{key}"] = torch.randn(shape, generator=generator) * 0.2
    return {
        **{key: value for key, value in config.items() if key not in dropped},
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "rope_theta": 5000000,
        "swa_rope_theta": 10000,
        "partial_rotary_factor": 0.334,
        "layernorm_epsilon": 1e-5,
        "sliding_window": 8,
        "sliding_window_size": 8,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
    }


@cache
def _session_dir() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="atom-cluster-drafts-")
