"""Brings quantized weights into the form that `gemm_packed` reads, once after loading. Knows no products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from atom_cluster.ops.number_formats import pack_nibbles, unpack_nibbles
from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.ops.triton.codes import EIGHT_BITS, FLOAT4, INT4, PackedWeight

_RUNS = {INT4: 64, FLOAT4: 64, EIGHT_BITS: 128}
_KINDS = {"int4": INT4, "float4": FLOAT4, "int8": EIGHT_BITS, "float8": EIGHT_BITS}
_MIN_CHUNK = 16
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A weight, and the input that each of its columns is for; None: its own."""

    weight: PackedWeight
    order_I: torch.Tensor | None


def pack_weight(weight: QuantizedWeight) -> Packed | None:
    """None when groups of inputs are too small or cut too oddly."""
    num_in, group_in = weight.num_in, min(weight.block[1], weight.num_in)
    order_I: torch.Tensor | None = None
    if weight.input_group is not None:
        sizes = torch.bincount(weight.input_group, minlength=weight.scale.shape[1])
        if not bool((sizes == sizes[0]).all()):
            return None
        group_in = num_in // weight.scale.shape[1]
        order_I = torch.argsort(weight.input_group, stable=True)
    num_groups = weight.scale.shape[1]
    kind = _KINDS[weight.number]
    run = chunk = _RUNS[kind]
    if num_groups > 1:
        chunk = min(run, group_in & -group_in)
        # A run may have several whole groups, or be a part of one.
        run = run if run % group_in == 0 else chunk
    if chunk < _MIN_CHUNK:
        return None
    codes = weight.codes
    if weight.number in ("int4", "float4"):
        codes = _pair_runs(codes, order_I, run, 0x88 if weight.number == "int4" else 0)
    elif order_I is not None:
        codes = codes.view(torch.uint8).index_select(1, order_I).view(codes.dtype)
    zero = None if weight.zero is None else weight.zero.float() - (8 if weight.number == "int4" else 0)
    packed = PackedWeight(
        kind=kind,
        codes=codes.contiguous(),
        scale_GO=_by_group(_narrowed(weight.scale), weight),
        zero_GO=None if zero is None else _by_group(_narrowed_zero(zero), weight),
        num_in=num_in,
        group_in=group_in,
        run=run,
        chunk=chunk,
    )
    return Packed(weight=packed, order_I=order_I)


def _pair_runs(packed: torch.Tensor, order_I: torch.Tensor | None, run: int, filler: int) -> torch.Tensor:
    """Codes two to a byte, neighbours -> codes of two runs of inputs, side by side. [O, I / 2], I padded."""
    found = []
    for rows in torch.split(packed, _ROWS_AT_A_TIME):
        codes = unpack_nibbles(rows)
        if order_I is not None:
            codes = codes.index_select(1, order_I)
        codes = F.pad(codes, (0, -codes.shape[1] % (2 * run)), value=filler & 0xF)
        pairs = codes.view(len(rows), -1, 2, run)
        found.append(pack_nibbles(pairs.transpose(2, 3).flatten(1)))
    return torch.cat(found)


def _by_group(per_block: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """[blocks of outputs, G] -> [G, O]"""
    rows = weight.block[0]
    if rows > 1:
        per_block = per_block.repeat_interleave(rows, 0)[: weight.num_out]
    return per_block.T.contiguous()


def _narrowed(scale: torch.Tensor) -> torch.Tensor:
    """In half precision where nothing is lost."""
    if scale.dtype != torch.float32:
        return scale
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


def _narrowed_zero(zero: torch.Tensor) -> torch.Tensor:
    """In eight bits, else half precision, where nothing is lost."""
    narrow = zero.clamp(-128, 127).to(torch.int8)
    return narrow if torch.equal(narrow.float(), zero) else _narrowed(zero)
