"""Inputs rounded to eight and four bits."""

import torch

from atom_cluster.ops.quantized import InputQuantization
from atom_cluster.ops.triton import quantize, runtime


def launch(spec: InputQuantization, *, num_in: int = 7168) -> None:
    float8_dtype = torch.float8_e4m3fnuz if runtime.arch() == "gfx942" else torch.float8_e4m3fn
    x = torch.empty(4, num_in, dtype=torch.bfloat16)
    if spec.scale_format == "e8m0":
        quantize.round_inputs(x, spec, float8_dtype=float8_dtype)
    else:
        scale = torch.empty(()) if spec.is_static else None
        quantize.quantize_inputs(x, spec, float8_dtype=float8_dtype, static_scale=scale)


LAUNCHES = {
    "float8_per_token": lambda: launch(InputQuantization(number="float8")),
    "float8_per_long_token": lambda: launch(InputQuantization(number="float8"), num_in=28672),
    "float8_per_group": lambda: launch(InputQuantization(number="float8", group_size=128)),
    "float8_static": lambda: launch(InputQuantization(number="float8", is_static=True)),
    "int8_per_token": lambda: launch(InputQuantization(number="int8")),
    "mxfp8": lambda: launch(InputQuantization(number="float8", group_size=32, scale_format="e8m0")),
    "mxfp4": lambda: launch(InputQuantization(number="float4", group_size=32, scale_format="e8m0")),
}
