"""Products of very few tokens on sm_90, made to keep memory busy while earlier kernels end. Knows no tuning.

A program's first weights are on their way into its shared memory before its inputs are there. The matrix units want
64 rows and eight columns, whatever there is: rows are outputs times parts of the inputs, columns the same parts times
tokens, and of what they give only a row with its own part counts, so that a program needs few outputs to be busy.
What becomes of inputs before, a norm or rounding, every program works out for itself: that takes less than a kernel.
Written in Gluon, which Triton calls experimental; `gemv` and `gemm` do without.
Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.runtime import varying

MAX_TOKENS = 8
COLUMNS = 8
"""Of the matrix units: tokens times parts."""
ROUNDED_GROUP = 128
"""Inputs that share a scale, if not all do."""
_MAX_INPUTS = 32768
"""Of all tokens, which a program holds."""
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvBlocks:
    """How a product is cut."""

    inputs: int
    """Of each part, read at a time."""
    num_warps: int
    """Sixteen rows each; a multiple of 4."""
    num_stages: int
    norms: bool = False
    """Whether it is worth while to normalise inputs on the way, which every program does for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How inputs become float8, and what the products of codes are multiplied by."""

    of_outputs: torch.Tensor
    """[blocks of outputs, blocks of inputs] float32."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale of the weight; inputs: all, or `ROUNDED_GROUP`. So do a token's inputs."""
    limit: float
    """The largest code."""
    max_abs: float
    """Inputs beyond it are cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """What becomes of inputs before they are multiplied: they are added to the residual stream and normalised."""

    residual_TI: torch.Tensor
    weight_I: torch.Tensor
    eps: float
    sum_TI: torch.Tensor
    """The residual stream with the inputs: a result, in other memory."""


def num_parts(num_tokens: int, num_in: int, step: int) -> int:
    """Into which the inputs are cut, at most; 0 where whole steps do not make them up."""
    parts = COLUMNS // triton.next_power_of_2(num_tokens)
    while parts and num_in % (step * parts):
        parts //= 2
    return parts


def is_fit(x_TI: torch.Tensor, weight_OI: torch.Tensor, step: int) -> bool:
    """Whether the kernel takes these, and has enough programs. step: inputs that are read at a time."""
    num_tokens, num_in = x_TI.shape
    parts = num_parts(num_tokens, num_in, step) if 0 < num_tokens <= MAX_TOKENS else 0
    return (
        runtime.is_hopper()
        and 2 * parts * triton.next_power_of_2(num_tokens) >= COLUMNS
        and x_TI.dtype.itemsize == 2
        and num_in * COLUMNS // parts <= _MAX_INPUTS
        and x_TI.stride(1) == weight_OI.stride(1) == 1
        and x_TI.stride(0) % _ALIGNMENT == weight_OI.stride(0) % _ALIGNMENT == 0
        and x_TI.data_ptr() % 16 == weight_OI.data_ptr() % 16 == 0
    )


def gemv_hopper(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    blocks: GemvBlocks,
    rounding: Rounding | None = None,
    *,
    norm: Norm | None = None,
    gates: bool = False,
) -> None:
    """out = x @ weight.T + bias, summed in float32, or with float8 weights, of rounded inputs.

    norm: of what `ops.norm.AddRmsNorm` makes of the inputs instead. All but its weight lie like the inputs.

    gates: outputs are silu(first half) * second half instead, of halves rounded to the dtype of the outputs.
    """
    num_tokens, num_in = x_TI.shape
    num_out = len(weight_OI)
    parts = num_parts(num_tokens, num_in, blocks.inputs)
    is_blockwise = rounding is not None and rounding.block[1] < num_in
    assert parts > 0 and not (is_blockwise and blocks.inputs != ROUNDED_GROUP)
    outputs = 16 * blocks.num_warps // parts
    _gemv_hopper_kernel[(triton.cdiv(num_out, outputs),)](
        x_TI,
        weight_OI,
        out_TO if rounding is None else rounding.of_outputs,
        out_TO if bias_O is None else bias_O,
        out_TO,
        x_TI if norm is None else norm.residual_TI,
        x_TI if norm is None else norm.weight_I,
        x_TI if norm is None else norm.sum_TI,
        0.0 if norm is None else norm.eps,
        num_tokens,
        num_out,
        x_TI.stride(0) // _ALIGNMENT,
        weight_OI.stride(0) // _ALIGNMENT,
        out_TO.stride(0),
        0 if rounding is None or rounding.block[0] >= num_out else rounding.of_outputs.stride(0),
        0.0 if rounding is None else rounding.limit,
        0.0 if rounding is None else rounding.max_abs,
        NUM_IN=num_in,
        ITEM_BYTES=weight_OI.element_size(),
        TOKENS=COLUMNS // parts,
        SCALES=0 if rounding is None else 2 if is_blockwise else 1,
        SCALE_O=1 if rounding is None else rounding.block[0],
        HAS_BIAS=bias_O is not None,
        HAS_NORM=norm is not None,
        IS_WIDE=norm is not None and norm.weight_I.element_size() > x_TI.element_size(),
        GATES=gates,
        BLOCK_I=blocks.inputs,
        STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
        launch_pdl=True,
    )


@gluon.jit(**varying("num_tokens"))
def _gemv_hopper_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    residual_ptr,
    norm_ptr,
    sum_ptr,
    eps,
    num_tokens,
    num_out,
    x_sixteenths,
    weight_sixteenths,
    out_stride,
    scale_stride,
    limit,
    max_abs,
    NUM_IN: gl.constexpr,
    ITEM_BYTES: gl.constexpr,
    TOKENS: gl.constexpr,
    SCALES: gl.constexpr,
    SCALE_O: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    IS_WIDE: gl.constexpr,
    GATES: gl.constexpr,
    BLOCK_I: gl.constexpr,
    STAGES: gl.constexpr,
):
    """SCALES: 0 none, 1 per token and per output, 2 per 128 inputs of both. Sixteenths tell the compiler that rows
    begin at multiples of sixteen. GATES: outputs take turns with those that they are the gates of."""
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * warps
    PARTS: gl.constexpr = 8 // TOKENS
    OUTPUTS: gl.constexpr = ROWS // PARTS
    PART_I: gl.constexpr = NUM_IN // PARTS
    TURNS: gl.constexpr = PART_I // BLOCK_I
    vector: gl.constexpr = 16 // ITEM_BYTES
    wide_lanes: gl.constexpr = min(32, BLOCK_I // vector)
    wide: gl.constexpr = gl.BlockedLayout([1, vector], [32 // wide_lanes, wide_lanes], [warps, 1], [1, 0])
    x_lanes: gl.constexpr = min(32, BLOCK_I // 8)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // x_lanes, x_lanes], [warps, 1], [1, 0])
    column_layout: gl.constexpr = gl.SliceLayout(1, x_layout)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 8, 32 // ITEM_BYTES])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // TOKENS, TOKENS], [warps, 1], [1, 0])
    weight_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_I], dtype)
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BLOCK_I], dtype)

    weight_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_I], weight_shared)
    x_smem = gl.allocate_shared_memory(dtype, [TURNS, 8, BLOCK_I], x_shared)

    first = gl.program_id(0) * OUTPUTS
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    inside = gl.arange(0, BLOCK_I, layout=gl.SliceLayout(0, wide))
    output = _output(first + row // PARTS, num_out, GATES)
    row_ptrs = weight_ptr + output.to(gl.int64) * (weight_sixteenths * 16) + (row % PARTS) * PART_I
    weight_ptrs = row_ptrs[:, None] + inside[None, :]
    for turn in gl.static_range(STAGES):
        if turn < TURNS:
            async_copy.async_copy_global_to_shared(weight_smem.index(turn), weight_ptrs + turn * BLOCK_I)
        async_copy.commit_group()
    out_output = first + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, out_layout))
    mma_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    mma_column = gl.arange(0, 8, layout=gl.SliceLayout(0, mma))
    if SCALES == 1:
        real = _output(out_output, num_out, GATES)
        weight_scale = gl.load(scale_ptr + (real // SCALE_O) * scale_stride)
    if SCALES == 2:
        real = _output(first + mma_row // PARTS, num_out, GATES)
        weight_scale_ptrs = scale_ptr + (real // SCALE_O) * scale_stride + (mma_row % PARTS) * TURNS
        weight_scale = gl.load(weight_scale_ptrs)
        x_scale_smem = gl.allocate_shared_memory(gl.float32, [TURNS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if HAS_BIAS:
        bias = gl.load(bias_ptr + _output(out_output, num_out, GATES)).to(gl.float32)
    column = gl.arange(0, 8, layout=column_layout)
    token = column % TOKENS
    x_inside = gl.arange(0, BLOCK_I, layout=gl.SliceLayout(0, x_layout))[None, :]
    x_offset = (token.to(gl.int64) * (x_sixteenths * 16) + (column // TOKENS) * PART_I)[:, None] + x_inside
    x_ptrs = x_ptr + x_offset
    is_token = (token < num_tokens)[:, None]
    if HAS_NORM:
        norm_weights = gl.tuple(())
        for turn in gl.static_range(TURNS):
            norm_ptrs = norm_ptr + ((column // TOKENS) * PART_I)[:, None] + x_inside
            norm_weights = norm_weights + (gl.load(norm_ptrs + turn * BLOCK_I),)
    gdc_launch_dependents()
    gdc_wait()

    # All of them are on their way before the first is stored: stores wait for each other.
    inputs = gl.tuple(())
    for turn in gl.static_range(TURNS):
        inputs = inputs + (gl.load(x_ptrs + turn * BLOCK_I, mask=is_token, other=0.0),)
    if HAS_NORM:
        residuals = gl.tuple(())
        for turn in gl.static_range(TURNS):
            residuals = residuals + (gl.load(residual_ptr + x_offset + turn * BLOCK_I, mask=is_token, other=0.0),)
        sums, squares = gl.tuple(()), gl.zeros([8, BLOCK_I], gl.float32, layout=x_layout)
        for turn in gl.static_range(TURNS):
            rounded = (inputs[turn].to(gl.float32) + residuals[turn].to(gl.float32)).to(x_ptr.dtype.element_ty)
            sums = sums + (rounded,)
            squares += rounded.to(gl.float32) * rounded.to(gl.float32)
        mean = gl.sum(gl.reshape(gl.sum(squares, axis=1), [PARTS, TOKENS]), axis=0) / NUM_IN
        factor = gl.rsqrt(_of_columns(mean, PARTS, TOKENS, column_layout) + eps)[:, None]
        inputs = gl.tuple(())
        for turn in gl.static_range(TURNS):
            y = sums[turn].to(gl.float32) * factor
            if not IS_WIDE:
                y = y.to(x_ptr.dtype.element_ty).to(gl.float32)
            inputs = inputs + ((y * norm_weights[turn].to(gl.float32)).to(x_ptr.dtype.element_ty),)
        if gl.program_id(0) == 0:
            for turn in gl.static_range(TURNS):
                gl.store(sum_ptr + x_offset + turn * BLOCK_I, sums[turn], mask=is_token)
    if SCALES == 1:
        largest = gl.zeros([8, BLOCK_I], gl.float32, layout=x_layout)
        for turn in gl.static_range(TURNS):
            largest = gl.maximum(largest, gl.abs(inputs[turn].to(gl.float32)))
        of_tokens = gl.max(gl.reshape(gl.max(largest, axis=1), [PARTS, TOKENS]), axis=0)
        x_scale = _scale_of(_of_columns(of_tokens, PARTS, TOKENS, column_layout), limit, max_abs)
    for turn in gl.static_range(TURNS):
        x = inputs[turn]
        if SCALES == 2:
            x_scale = _scale_of(gl.max(gl.abs(x.to(gl.float32)), axis=1), limit, max_abs)
            x_scale_smem.index(turn).store(x_scale)
        if SCALES:
            inverse = gl.div_rn(x_scale * 0.0 + 1.0, x_scale)
            inverse = gl.where(inverse < float("inf"), inverse, 0.0)
            # The conversion stops at the largest code by itself.
            x_smem.index(turn).store((x.to(gl.float32) * inverse[:, None]).to(dtype))
        else:
            x_smem.index(turn).store(x)
    fence_async_shared()

    total = gl.zeros([ROWS, 8], gl.float32, layout=mma)
    nothing = gl.zeros([ROWS, 8], gl.float32, layout=mma)
    for turn in range(TURNS):
        # Behind this, the weights are there, and every warp has done with those before them.
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        weight = weight_smem.index(turn % STAGES)
        columns = x_smem.index(turn).permute((1, 0))
        if SCALES:
            products = warpgroup_mma(weight, columns, nothing, use_acc=False, is_async=True)
        else:
            products = warpgroup_mma(weight, columns, total, is_async=True)
        if turn > 0:
            if TURNS > STAGES:
                following = turn - 1 + STAGES
                async_copy.async_copy_global_to_shared(
                    weight_smem.index(following % STAGES),
                    weight_ptrs + following * BLOCK_I,
                    mask=(row < (following < TURNS).to(gl.int32) * ROWS)[:, None],
                )
            async_copy.commit_group()
        products = warpgroup_mma_wait(0, deps=[products])
        if SCALES == 2:
            x_scale_c = x_scale_smem.index(turn).load(gl.SliceLayout(0, mma))
            total += products * (weight_scale[:, None] * x_scale_c[None, :])
            weight_scale = gl.load(weight_scale_ptrs + gl.minimum(turn + 1, TURNS - 1))
        elif SCALES == 1:
            total += products
        else:
            total = products
    async_copy.wait_group(0)

    if SCALES == 1:
        total *= gl.convert_layout(x_scale, gl.SliceLayout(0, mma))[None, :]
    total = gl.where((mma_row % PARTS)[:, None] == (mma_column // TOKENS)[None, :], total, 0.0)
    y = gl.sum(gl.sum(gl.reshape(total, [OUTPUTS, PARTS, PARTS, TOKENS]), axis=2), axis=1)
    y = gl.convert_layout(y, out_layout)
    if SCALES == 1:
        y *= weight_scale[:, None]
    if HAS_BIAS:
        y += bias[:, None]
    if GATES:
        y = y.to(out_ptr.dtype.element_ty).to(gl.float32)
        pair_layout: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32 // TOKENS, TOKENS, 1], [warps, 1, 1], [2, 1, 0])
        pairs = gl.permute(gl.reshape(y, [OUTPUTS // 2, 2, TOKENS]), (0, 2, 1))
        gate, up = gl.split(gl.convert_layout(pairs, pair_layout))
        y = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * up, out_layout)
        first, num_out = first // 2, num_out // 2
    STORED: gl.constexpr = OUTPUTS // 2 if GATES else OUTPUTS
    place = first + gl.arange(0, STORED, layout=gl.SliceLayout(1, out_layout))
    out_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, out_layout))
    out_ptrs = out_ptr + out_token.to(gl.int64)[None, :] * out_stride + place[:, None]
    gl.store(
        out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(place < num_out)[:, None] & (out_token < num_tokens)[None, :]
    )


@gluon.jit
def _output(place, num_out, GATES: gl.constexpr):
    """Of the weight. Beyond the last, it is the last, whose results are not stored."""
    if GATES:
        half = num_out // 2
        found = gl.minimum(place // 2, half - 1) + (place % 2) * half
    else:
        found = gl.minimum(place, num_out - 1)
    return found


@gluon.jit
def _of_columns(of_tokens, PARTS: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """[TOKENS] -> [columns]"""
    repeated = of_tokens[None, :] + gl.zeros([PARTS, TOKENS], gl.float32, layout=gl.AutoLayout())
    return gl.convert_layout(gl.reshape(repeated, [PARTS * TOKENS]), layout)


@gluon.jit
def _scale_of(largest, limit, max_abs):
    """As `quantize` does."""
    largest = gl.minimum(largest, max_abs)
    return gl.where(largest > 0, gl.div_rn(largest, largest * 0.0 + limit), 1.0)
