"""Turns a tiny float checkpoint into a quantized one in the hub's layout, and into the float one that it stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.quantization.formats import Format, mxfp4
from tests.tiny_models import tiny_model_dir

GPT_OSS_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
QUANTIZED = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\..*_proj(?:_with_mqa)?\.weight")


def write_pair(name: str, form: Format, folder: Path) -> tuple[Path, Path]:
    """(quantized checkpoint, checkpoint of the float64 weights that it stands for) of a tiny model."""
    source = tiny_model_dir(name)
    tensors = load_file(source / "model.safetensors")
    quantized, meant = {}, {}
    for key, tensor in tensors.items():
        if not QUANTIZED.fullmatch(key):
            quantized[key] = meant[key] = tensor
            continue
        stored, meant[key] = form.pack(tensor.double())
        quantized |= {f"{key.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in stored.items()}
    assert len(meant) == len(tensors) and quantized.keys() != tensors.keys()
    config = json.loads((source / "config.json").read_text())
    return (
        write(folder / "quantized", {**config, "quantization_config": form.config}, quantized),
        write(folder / "meant", config, meant),
    )


def write_gpt_oss_pair(folder: Path) -> tuple[Path, Path]:
    """The same of gpt-oss, whose experts are stacked; what they stand for is transformers' word."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = tiny_model_dir("gpt_oss")
    quantized, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[name] = meant[name] = tensor
            continue
        packed = [mxfp4("blocks", "scales")(expert.T.double())[0] for expert in tensor]
        blocks = torch.stack([expert["blocks"] for expert in packed])
        blocks = blocks.view(*blocks.shape[:2], -1, 16)
        scales = torch.stack([expert["scales"] for expert in packed])
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert meant[name].shape == tensor.shape
    config = json.loads((source / "config.json").read_text())
    return (
        write(folder / "quantized", {**config, "quantization_config": GPT_OSS_CONFIG}, quantized),
        write(folder / "meant", config, meant),
    )


def write(directory: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory
