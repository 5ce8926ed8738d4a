"""Writes weights in the formats that quantized checkpoints of the hub have, and says what they stand for.

Written from the formats' definitions, without the library's code: each takes a weight [out, in] and gives the tensors
that a checkpoint holds of it, by suffix, and the weight they mean in float64. How inputs are rounded is the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FP8_MAX = 448.0
FP4_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INPUT_SCALE = 0.03

Stored = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]
RoundInputs = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One format of checkpoints."""

    config: dict[str, object]
    """`quantization_config`."""
    pack: Pack
    round_inputs: RoundInputs | None = None
    """float64 -> float64; None: inputs are used as they are."""


# --- rounding, element by element ---


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn)


def groups_of(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], -1, size)


def power_of_two(max_abs: torch.Tensor, exponent_of_largest: int) -> torch.Tensor:
    """OCP microscaling: the power of two below, less that of the format's largest number; up from 1.75 times it."""
    exponent = max_abs.clamp(min=1e-30).log2().floor()
    exponent += (max_abs / 2**exponent > 1.75).double()
    return torch.where(max_abs > 0, 2 ** (exponent - exponent_of_largest), 1.0)


def nearest_fp4(x: torch.Tensor) -> torch.Tensor:
    """Codes: sign bit and index into the grid; of two equally near numbers the one with an even index."""
    distance = (x.abs()[..., None] - FP4_GRID).abs()
    distance[..., 1::2] += 1e-12
    return distance.argmin(-1) + 8 * (x < 0)


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    return FP4_GRID[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    return (scale.log2() + 127).to(torch.uint8)


# --- packing ---


def pack_bits(codes: torch.Tensor, num_bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The last axis into int32, first code in the lowest bits, or as `order` says which code is in which place."""
    per_int = 32 // num_bits
    codes = groups_of(codes.long(), per_int)
    total = torch.zeros(codes.shape[:-1], dtype=torch.int64)
    for place in range(per_int):
        total |= codes[..., order[place] if order else place] << (num_bits * place)
    return (total & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


# --- formats ---


def float8(granularity: str | tuple[int, int], scale_name: str = "weight_scale", **options: bool) -> Pack:
    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        rows, columns = {"tensor": tuple(weight.shape), "channel": (1, weight.shape[1])}.get(granularity, granularity)
        codes, full_scale = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        blocks = []
        for row in range(0, weight.shape[0], rows):
            for column in range(0, weight.shape[1], columns):
                where = (slice(row, row + rows), slice(column, column + columns))
                max_abs = weight[where].abs().max()
                scale = power_of_two(max_abs, 8) if options.get("is_e8m0") else (max_abs / FP8_MAX).float().double()
                codes[where], full_scale[where] = fp8(weight[where] / scale), scale
                blocks.append(scale)
        scale = torch.stack(blocks).reshape(-(-weight.shape[0] // rows), -1)
        stored = e8m0(scale) if options.get("is_e8m0") else scale.float()
        if granularity == "tensor":
            stored = stored.reshape(()) if options.get("is_scalar") else stored.reshape(1)
        if options.get("is_flat"):
            stored = stored.reshape(-1)
        tensors = {"weight": codes, scale_name: stored}
        if options.get("is_static"):
            tensors["input_scale"] = torch.tensor([INPUT_SCALE])
        return tensors, codes.double() * full_scale

    return pack


def int8_channel(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).float()
    codes = (weight / scale.double()).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def grouped_int(
    weight: torch.Tensor, num_bits: int, group: torch.Tensor, *, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned codes [O, I], zero points and float16 scales [O, groups], and the weight; `group` of each input."""
    num_groups, top = int(group.max()) + 1, 2**num_bits - 1
    scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float64)
    zero = torch.full_like(scale, 2 ** (num_bits - 1))
    for index in range(num_groups):
        part = weight[:, group == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if is_symmetric:
            scale[:, index] = part.abs().amax(1) / (2 ** (num_bits - 1) - 1)
        else:
            scale[:, index] = (high - low) / top
            # 1 is the least that the first version of GPTQ can express.
            zero[:, index] = (-low / scale[:, index]).round().clamp(1, top)
    scale = scale.half().double()
    codes = (weight / scale[:, group] + zero[:, group]).round().clamp(0, top)
    return codes, zero, scale.half(), (codes - zero[:, group]) * scale[:, group]


def consecutive(num_in: int, size: int) -> torch.Tensor:
    return torch.arange(num_in) // size


def shuffled(num_in: int, size: int) -> torch.Tensor:
    """The groups of inputs that were quantized in an order of their own: equal for all layers of that many inputs."""
    return consecutive(num_in, size)[torch.randperm(num_in, generator=torch.Generator().manual_seed(num_in))]


def packed_int(num_bits: int, size: int, *, is_symmetric: bool, has_index: bool = False) -> Pack:
    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        group = (shuffled if has_index else consecutive)(weight.shape[1], size)
        codes, zero, scale, meant = grouped_int(weight, num_bits, group, is_symmetric=is_symmetric)
        tensors = {
            "weight_packed": pack_bits(codes, num_bits),
            "weight_scale": scale.bfloat16() if is_symmetric else scale,
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64 if num_bits == 4 else torch.int32),
        }
        if is_symmetric:  # the scale is stored in bfloat16
            meant = (codes - zero[:, group]) * tensors["weight_scale"].double()[:, group]
        else:
            tensors["weight_zero_point"] = pack_bits(zero.T, num_bits).T.contiguous()
        if has_index:
            tensors["weight_g_idx"] = group.int()
        return tensors, meant

    return pack


def gptq(num_bits: int, size: int, *, is_reordered: bool = False, offset: int = 1) -> Pack:
    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        num_in = weight.shape[1]
        size_here = num_in if size == -1 else size
        group = (shuffled if is_reordered else consecutive)(num_in, size_here)
        codes, zero, scale, meant = grouped_int(weight, num_bits, group, is_symmetric=False)
        tensors = {
            "qweight": pack_bits(codes, num_bits).T.contiguous(),
            "qzeros": pack_bits(zero.T - offset, num_bits),
            "scales": scale.T.contiguous(),
            "g_idx": group.int(),
        }
        return tensors, meant

    return pack


def awq(size: int) -> Pack:
    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        codes, zero, scale, meant = grouped_int(weight, 4, consecutive(weight.shape[1], size), is_symmetric=False)
        tensors = {
            "qweight": pack_bits(codes.T, 4, AWQ_ORDER),
            "qzeros": pack_bits(zero.T, 4, AWQ_ORDER),
            "scales": scale.T.contiguous(),
        }
        return tensors, meant

    return pack


def mxfp4(codes_name: str, scale_name: str) -> Pack:
    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        grouped = groups_of(weight, 32)
        scale = power_of_two(grouped.abs().amax(-1, keepdim=True), 2)
        codes = nearest_fp4(grouped / scale)
        tensors = {codes_name: pack_pairs(codes.flatten(-2)), scale_name: e8m0(scale.squeeze(-1))}
        return tensors, (fp4_values(codes) * scale).flatten(-2)

    return pack


# --- how inputs are rounded ---


def per_token_fp8(x: torch.Tensor, max_abs: float = float("inf")) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(max=max_abs) / FP8_MAX
    return fp8_exactly(x / scale) * scale


def fp8_exactly(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).double()


def per_group_fp8(size: int, *, is_e8m0: bool = False) -> RoundInputs:
    def round_inputs(x: torch.Tensor) -> torch.Tensor:
        grouped = groups_of(x, size)
        max_abs = grouped.abs().amax(-1, keepdim=True)
        scale = power_of_two(max_abs, 8) if is_e8m0 else max_abs / FP8_MAX
        return (fp8_exactly(grouped / scale) * scale).flatten(-2)

    return round_inputs


def static_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = torch.tensor(INPUT_SCALE).double()
    return fp8_exactly(x / scale) * scale


def per_token_int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def per_group_fp4(x: torch.Tensor) -> torch.Tensor:
    grouped = groups_of(x, 32)
    scale = power_of_two(grouped.abs().amax(-1, keepdim=True), 2)
    return (fp4_values(nearest_fp4(grouped / scale)) * scale).flatten(-2)


# --- configurations as the hub has them ---


def compressed(layout: str, weights: dict[str, object], inputs: dict[str, object] | None) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


def number(bits: int, kind: str, strategy: str, **more: object) -> dict[str, object]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def quark(weight: dict[str, object], inputs: dict[str, object] | None) -> dict[str, object]:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head", "re:.*mlp.gate$"],
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
    }


_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "symmetric": None}
_INT4 = number(4, "int", "group", group_size=32)
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}

FORMATS = {
    "fp8_block": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 32]},
        float8((48, 32), "weight_scale_inv"),
        per_group_fp8(32),
    ),
    "fp8_block_ue8m0": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]},
        float8((16, 16), "weight_scale_inv"),
        per_group_fp8(16, is_e8m0=True),
    ),
    "fp8_static": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        float8("tensor", is_static=True, is_scalar=True),
        static_fp8,
    ),
    "fbgemm": Format(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1.5, "modules_to_not_convert": ["lm_head"]},
        float8("channel"),
        lambda x: per_token_fp8(x, 1.5),
    ),
    "ct_fp8_channel": Format(
        compressed("float-quantized", number(8, "float", "channel"), number(8, "float", "token", dynamic=True)),
        float8("channel"),
        per_token_fp8,
    ),
    "ct_fp8_static": Format(
        compressed("naive-quantized", number(8, "float", "tensor"), number(8, "float", "tensor")),
        float8("tensor", is_static=True),
        static_fp8,
    ),
    "ct_fp8_block": Format(
        compressed(
            "float-quantized",
            number(8, "float", "block", block_structure=[16, 32]),
            number(8, "float", "group", group_size=32, dynamic=True),
        ),
        float8((16, 32)),
        per_group_fp8(32),
    ),
    "ct_mxfp8": Format(
        compressed(
            "mxfp8-quantized",
            number(8, "float", "group", group_size=32, scale_dtype="torch.uint8"),
            number(8, "float", "group", group_size=32, dynamic=True, scale_dtype="torch.uint8"),
        ),
        float8((1, 32), is_e8m0=True),
        per_group_fp8(32, is_e8m0=True),
    ),
    "ct_int8": Format(
        compressed("int-quantized", number(8, "int", "channel"), number(8, "int", "token", dynamic=True)),
        int8_channel,
        per_token_int8,
    ),
    "ct_int4": Format(compressed("pack-quantized", _INT4, None), packed_int(4, 32, is_symmetric=True)),
    "ct_int4_reordered": Format(
        compressed("pack-quantized", {**_INT4, "symmetric": False, "actorder": "group"}, None),
        packed_int(4, 32, is_symmetric=False, has_index=True),
    ),
    "ct_int8_packed": Format(
        compressed("pack-quantized", {**_INT4, "num_bits": 8, "symmetric": False}, None),
        packed_int(8, 32, is_symmetric=False),
    ),
    "ct_mxfp4": Format(
        compressed("mxfp4-pack-quantized", number(4, "float", "group", group_size=32), None),
        mxfp4("weight_packed", "weight_scale"),
    ),
    "quark_ptpc": Format(
        quark(
            {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True},
            {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True, "symmetric": True},
        ),
        float8("channel", is_flat=True),
        per_token_fp8,
    ),
    "quark_mxfp4": Format(
        quark({**_FP4, "is_dynamic": False}, {**_FP4, "is_dynamic": True}),
        mxfp4("weight", "weight_scale"),
        per_group_fp4,
    ),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32)),
    "gptq": Format(_GPTQ, gptq(4, 32)),
    "gptq_reordered": Format({**_GPTQ, "desc_act": True}, gptq(4, 32, is_reordered=True)),
    "gptq_v2_int8": Format({**_GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, 32, offset=0)),
    "gptq_channel": Format({**_GPTQ, "group_size": -1}, gptq(4, -1)),
}
