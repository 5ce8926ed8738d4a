"""Linear op for GPUs, quantized weights: which kernel takes which weight, and in what form. Knows no checkpoints.

Three kinds: codes of weights and of inputs that are multiplied as they are (`CodesLinear`), codes that become floats in
registers (`PackedLinear`), and what neither can do, left to the reference. Shape suffixes: T tokens, I inputs,
O outputs, G groups of inputs.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.number_formats import largest
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.torch_ref.quantized import QuantizedLinear
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.activation import silu_and_mul
from atom_cluster.ops.triton.codes import KIND_NAMES, PackedWeight
from atom_cluster.ops.triton.gemm import Scales, gemm
from atom_cluster.ops.triton.gemm_hopper import is_fit as is_fit_for_gemm
from atom_cluster.ops.triton.gemm_packed import dequantize_packed, gemm_packed
from atom_cluster.ops.triton.gemv_hopper import ROUNDED_GROUP, Rounding
from atom_cluster.ops.triton.linear import (
    blocks_of_some_tokens,
    new_counters,
    product_by_hopper,
    product_of_some_tokens,
)
from atom_cluster.ops.triton.linear_blocks import (
    GEMM,
    LIBRARY,
    MAX_TUNED_TOKENS,
    choose,
    fitted,
    gemm_blocks,
    many_tokens_blocks,
)
from atom_cluster.ops.triton.pack import pack_weight
from atom_cluster.ops.triton.quantize import quantize_inputs, round_inputs

MAX_STEP = 128
_MIN_STEP = 32
_MAX_PACKED_TOKENS = 512
"""More are multiplied by the library, with weights that were made floats, some outputs at a time."""
_DEQUANTIZED_ELEMENTS = 1 << 27
_log = logging.getLogger(__name__)

_LIBRARY_ALIGNMENT = 16
_LIBRARY_TOKENS = 4
"""Divides the tokens whose scales per group the library reads."""


class CodesLinear:
    """`(round(x) codes @ weight codes) * scales + bias`."""

    def __init__(
        self, weight: QuantizedWeight, inputs: InputQuantization, bias_O: torch.Tensor | None, step: int
    ) -> None:
        """step: inputs that no group of either side cuts, a power of two."""
        num_out, num_in = weight.num_out, weight.num_in
        self.name = weight.name
        self._codes_OI = weight.codes.contiguous()
        self._inputs = inputs
        self._input_scale = weight.input_scale
        self._bias_O = bias_O
        self._step = step
        self._is_blockwise = weight.block[1] < num_in or (inputs.group_size or num_in) < num_in
        scale, rows = weight.scale, weight.block[0]
        if not self._is_blockwise and rows > 1:
            scale, rows = scale.repeat_interleave(rows, 0)[:num_out].contiguous(), 1
        self._block = (rows, weight.block[1])
        self._scale = _padded_columns(scale) if self._is_blockwise else scale
        self._group_in = inputs.group_size or num_in
        self._kind = ("float8_block" if self._is_blockwise else "float8") if weight.number == "float8" else "int8"
        self._counters = new_counters(num_out, weight.codes.device)
        self._rounds = torch.zeros_like(self._counters)
        self._rounding = self._rounding_of_few_tokens(weight, inputs)
        self._takes_some_tokens = weight.codes.dtype == torch.float8_e4m3fn and (
            not self._is_blockwise or (self._block, self._group_in) == ((128, 128), 128)
        )
        self._refused_by_library: set[int] = set()
        """Numbers of tokens."""
        self._has_library = (
            weight.number == "float8"
            and num_out % _LIBRARY_ALIGNMENT == num_in % _LIBRARY_ALIGNMENT == 0
            and (runtime.is_hopper() or runtime.is_hip() and not self._is_blockwise)
            and (not self._is_blockwise or self._block == (128, 128) and self._group_in == 128)
        )

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        return self._multiply(x_TI, None)

    def gated(self, x_TI: torch.Tensor, activation: GateAndMul) -> torch.Tensor:
        """[T, in] -> [T, out / 2]"""
        return self._multiply(x_TI, activation)

    def _rounding_of_few_tokens(self, weight: QuantizedWeight, inputs: InputQuantization) -> Rounding | None:
        """For the kernel that rounds inputs itself; None where it does not know how."""
        groups = (inputs.group_size or weight.num_in, weight.block[1])
        if inputs.is_static or weight.codes.dtype != torch.float8_e4m3fn:
            return None
        if self._is_blockwise and groups != (ROUNDED_GROUP, ROUNDED_GROUP):
            return None
        return Rounding(
            of_outputs=self._scale,
            block=self._block,
            limit=largest("float8", weight.codes.dtype),
            max_abs=math.inf if inputs.max_abs is None else inputs.max_abs,
        )

    def _multiply(self, x_TI: torch.Tensor, activation: GateAndMul | None) -> torch.Tensor:
        gates, y_TO = activation is silu_and_mul, None
        if self._rounding is not None:
            y_TO = product_by_hopper(
                self._kind, x_TI, self._codes_OI, self._bias_O, x_TI.dtype, self._rounding, gates=gates
            )
        if y_TO is None and self._takes_some_tokens:
            y_TO = self._of_some_tokens(x_TI, activation)
            if y_TO is not None:
                return y_TO
        if y_TO is None:
            y_TO, gates = self._by_others(x_TI), False
        return y_TO if activation is None or gates else activation(y_TO)

    def _of_some_tokens(self, x_TI: torch.Tensor, activation: GateAndMul | None) -> torch.Tensor | None:
        """Where that kernel is the one to take."""
        num_tokens, (num_out, num_in) = len(x_TI), self._codes_OI.shape
        blocks = blocks_of_some_tokens(self._kind, num_out, num_in, num_tokens)
        # Codes lie as they do in the weight.
        if blocks is None or not is_fit_for_gemm(self._codes_OI[:1].expand(num_tokens, -1), self._codes_OI, x_TI.dtype):
            return None
        codes_TI, scale_TG = self._quantized(x_TI, _LIBRARY_TOKENS if self._is_blockwise else 1)
        scales = Scales(of_tokens_TG=scale_TG, of_outputs=self._scale, group_in=self._group_in, block=self._block)
        return product_of_some_tokens(
            codes_TI[:num_tokens],
            self._codes_OI,
            self._bias_O,
            x_TI.dtype,
            self._rounds,
            blocks,
            scales,
            activation=activation,
        )

    def _quantized(self, x_TI: torch.Tensor, token_multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales, those of a group side by side."""
        return quantize_inputs(
            x_TI if x_TI.stride(1) == 1 else x_TI.contiguous(),
            self._inputs,
            float8_dtype=self._codes_OI.dtype if self._inputs.number == "float8" else torch.float8_e4m3fn,
            static_scale=self._input_scale,
            scales_by_group=True,
            token_multiple=token_multiple,
        )

    def _by_others(self, x_TI: torch.Tensor) -> torch.Tensor:
        num_tokens, (num_out, num_in) = len(x_TI), self._codes_OI.shape
        if num_tokens == 0:
            return x_TI.new_empty(0, num_out)
        blocks = many_tokens_blocks()
        uses_library = self._has_library and x_TI.dtype == torch.bfloat16 and num_tokens not in self._refused_by_library
        if num_tokens <= MAX_TUNED_TOKENS:
            choice = choose(self._kind, num_out, num_in, num_tokens)
            uses_library = uses_library and choice["kernel"] == LIBRARY
            if choice["kernel"] == GEMM:
                blocks = gemm_blocks(choice)
        codes_TI, scale_TG = self._quantized(x_TI, _LIBRARY_TOKENS if uses_library and self._is_blockwise else 1)
        if uses_library:
            try:
                return self._by_library(codes_TI, scale_TG, x_TI.dtype)[:num_tokens]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as exc:
                # What it takes depends on its version; it says so before anything is computed.
                _log.warning("%s: the library refuses %d tokens (%s)", self.name, num_tokens, str(exc).splitlines()[0])
                self._refused_by_library.add(num_tokens)
                blocks = many_tokens_blocks()
        out_TO = torch.empty(len(codes_TI), num_out, dtype=x_TI.dtype, device=x_TI.device)
        scales = Scales(of_tokens_TG=scale_TG, of_outputs=self._scale, group_in=self._group_in, block=self._block)
        blocks = fitted(blocks, self._step)
        gemm(codes_TI, self._codes_OI, self._bias_O, out_TO, self._counters, blocks, scales)
        return out_TO[:num_tokens]

    def _by_library(self, codes_TI: torch.Tensor, scale_TG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._inputs.is_static:
            scale_TG = scale_TG.contiguous()
        y_TO = torch._scaled_mm(codes_TI, self._codes_OI.T, scale_TG, self._scale.T, out_dtype=dtype)
        return y_TO if self._bias_O is None else y_TO.add_(self._bias_O)


class PackedLinear:
    """`x @ weight.T + bias`, of weights that become floats where they are multiplied."""

    def __init__(
        self,
        weight: PackedWeight,
        name: str,
        bias_O: torch.Tensor | None,
        *,
        order_I: torch.Tensor | None,
        inputs: InputQuantization | None,
        float8_dtype: torch.dtype,
    ) -> None:
        """order_I: the input of each column of the weight; None: its own."""
        self.name = name
        self._weight = weight
        self._bias_O = bias_O
        self._order_I = order_I
        self._inputs = inputs
        self._float8_dtype = float8_dtype
        self._kind = KIND_NAMES[weight.kind]
        self._counters = new_counters(weight.num_out, weight.codes.device)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        num_tokens, num_out = len(x_TI), self._weight.num_out
        out_TO = torch.empty(num_tokens, num_out, dtype=x_TI.dtype, device=x_TI.device)
        if num_tokens == 0:
            return out_TO
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        if self._inputs is not None:
            x_TI = round_inputs(x_TI, self._inputs, float8_dtype=self._float8_dtype)
        if self._order_I is not None:
            x_TI = x_TI.index_select(1, self._order_I)
        if num_tokens <= _MAX_PACKED_TOKENS or x_TI.dtype == torch.float32:
            choice = choose(self._kind, num_out, self._weight.num_in, min(num_tokens, MAX_TUNED_TOKENS))
            blocks = gemm_blocks(choice)
            if x_TI.dtype == torch.float32:
                blocks = replace(blocks, tokens=16, outputs=32, num_stages=1)
            gemm_packed(x_TI, self._weight, self._bias_O, out_TO, self._counters, blocks)
            return out_TO
        size = max(1, _DEQUANTIZED_ELEMENTS // self._weight.num_in)
        for start in range(0, num_out, size):
            rows = slice(start, min(start + size, num_out))
            torch.mm(x_TI, dequantize_packed(self._weight, rows, x_TI.dtype).T, out=out_TO[:, rows])
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)


def prepare_quantized_linear(weight: QuantizedWeight, bias_O: torch.Tensor | None, *, dtype: torch.dtype) -> LinearOp:
    """The weight in the form of the kernel that takes it."""
    inputs = weight.inputs
    bias_O = None if bias_O is None else bias_O.contiguous()
    if inputs is not None and inputs.number == weight.number and inputs.scale_format == "float32":
        step = _common_step(weight, inputs)
        is_plain = weight.zero is None and weight.input_group is None and weight.scale.dtype == torch.float32
        if is_plain and step >= _MIN_STEP and weight.number in ("float8", "int8"):
            return CodesLinear(weight, inputs, bias_O, step)
    elif inputs is None or inputs.scale_format == "e8m0":
        # What is rounded with powers of two, bfloat16 holds.
        packed = pack_weight(weight)
        if packed is not None:
            float8_dtype = weight.codes.dtype if weight.number == "float8" else torch.float8_e4m3fn
            return PackedLinear(
                packed.weight, weight.name, bias_O, order_I=packed.order_I, inputs=inputs, float8_dtype=float8_dtype
            )
    return _ReferenceLinear(weight, bias_O, dtype)


class _ReferenceLinear(QuantizedLinear):
    """For blocks and groups that no kernel knows."""

    @property
    def name(self) -> str:
        """Says so."""
        return f"{super().name}, by the reference: no kernel for its blocks and inputs"


def _common_step(weight: QuantizedWeight, inputs: InputQuantization) -> int:
    """Inputs, a power of two, that neither blocks of the weight nor groups of inputs cut."""
    sizes = [size for size in (weight.block[1], inputs.group_size) if size is not None and size < weight.num_in]
    common = math.gcd(*sizes) if sizes else MAX_STEP
    return min(MAX_STEP, common & -common)


def _padded_columns(scale: torch.Tensor) -> torch.Tensor:
    """The same, with rows that begin at multiples of four elements, as the library wants them."""
    rows, columns = scale.shape
    padded = scale.new_empty(rows, -(-columns // 4) * 4)
    padded[:, :columns] = scale
    return padded[:, :columns]
