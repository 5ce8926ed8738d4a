"""Experts: Qwen3-30B-A3B in floats, DeepSeek-V3 in float8 blocks, gpt-oss in MXFP4, and groups of integers."""

from collections.abc import Callable

import torch

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.number_formats import NumberFormat
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.triton import moe, runtime

CODES = {"int8": torch.int8, "int4": torch.uint8, "float4": torch.uint8}


def plain(num_tokens: int) -> Callable[[], object]:
    def launch() -> object:
        experts = moe.prepare_experts(
            torch.empty(128, 2 * 768, 1, dtype=torch.bfloat16).expand(-1, -1, 2048)[:1],
            torch.empty(1, 2048, 768, dtype=torch.bfloat16),
            gate_up_bias=None,
            down_bias=None,
            activation=ExpertActivation(),
            dtype=torch.bfloat16,
        )
        return apply(experts, num_tokens, 2048)

    return launch


def apply(experts: object, num_tokens: int, size: int) -> object:
    choices = torch.zeros(num_tokens, 8, dtype=torch.int64)
    x = torch.empty(num_tokens, size, dtype=torch.bfloat16)
    return experts(x, choices, torch.empty(num_tokens, 8))  # type: ignore[operator]


def quantized(
    num_tokens: int,
    number: NumberFormat,
    size: int,
    block: tuple[int, int],
    *,
    inputs: InputQuantization | None = None,
    has_zero: bool = False,
    is_e8m0: bool = False,
) -> Callable[[], object]:
    def weight(num_out: int, num_in: int) -> QuantizedWeight:
        float8 = torch.float8_e4m3fnuz if runtime.arch() == "gfx942" else torch.float8_e4m3fn
        columns = num_in // 2 if number in ("int4", "float4") else num_in
        blocks = (1, -(-num_out // block[0]), -(-num_in // block[1]))
        return QuantizedWeight(
            number=number,
            codes=torch.empty(1, num_out, columns, dtype=CODES.get(number, float8)),
            scale=torch.empty(blocks, dtype=torch.uint8 if is_e8m0 else torch.float32),
            block=block,
            zero=torch.empty(blocks, dtype=torch.int16) if has_zero else None,
            inputs=inputs,
        )

    def launch() -> object:
        biases = (
            [torch.empty(1, n, dtype=torch.bfloat16) for n in (2 * size, size)] if number == "float4" else [None] * 2
        )
        experts = moe.prepare_quantized_experts(
            weight(2 * size, size),
            weight(size, size),
            gate_up_bias=biases[0],
            down_bias=biases[1],
            activation=ExpertActivation(kind="swiglu_oai", limit=7.0) if number == "float4" else ExpertActivation(),
            dtype=torch.bfloat16,
        )
        return apply(experts, num_tokens, size)

    return launch


BLOCKS = InputQuantization(number="float8", group_size=128)
PER_TOKEN = InputQuantization(number="int8")
SIZES = {"one": 1, "few": 3, "many": 200}
MOST = 5000
LAUNCHES = {
    **{f"bfloat16-{name}": plain(tokens) for name, tokens in SIZES.items()},
    **{
        f"float8-{name}": quantized(tokens, "float8", 2048, (128, 128), inputs=BLOCKS) for name, tokens in SIZES.items()
    },
    "float8-most": quantized(MOST, "float8", 2048, (128, 128), inputs=BLOCKS),
    **{f"mxfp4-{name}": quantized(tokens, "float4", 2880, (1, 32), is_e8m0=True) for name, tokens in SIZES.items()},
    **{f"awq-{name}": quantized(tokens, "int4", 2048, (1, 128), has_zero=True) for name, tokens in SIZES.items()},
    "int8-many": quantized(200, "int8", 2048, (1, 2048), inputs=PER_TOKEN),
}
