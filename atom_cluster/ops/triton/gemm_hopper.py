"""Products of up to a few hundred tokens on sm_90, by warps with different tasks. Knows no tuning.

One warp has blocks of weights and of tokens copied to shared memory as room becomes free there, the first weights
before the inputs are there. Each of up to three times four warps multiplies one or two pieces of 64 outputs by all
tokens of the program: weights are the rows of the matrix units, and every output beside the others spares tokens a way
from the cache that all multiprocessors share. Where outputs are few, programs share them, each with some of the inputs:
every one leaves its part in memory and, when all have, adds up some tokens' parts, always in the same order.
Written in Gluon, which Triton calls experimental; `gemm` does without.
Shape suffixes: T tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.bulk_copies import box_layout
from atom_cluster.ops.triton.gemm import Scales
from atom_cluster.ops.triton.gemm_hopper_cut import LINE_BYTES, PIECE, HopperBlocks, chunk, stages_with_room
from atom_cluster.ops.triton.gemm_hopper_sums import finished, gated, write_together
from atom_cluster.ops.triton.mla_hopper import HAS_TASKS
from atom_cluster.ops.triton.runtime import varying

MAX_TOKENS = 256
_ALIGNMENT = 16
_REGISTERS = {1: (248, 0), 2: (168, 240), 3: (128, 160)}
"""By groups: those of a thread, and those of groups beyond the first while other warps have fewer. Two programs have no
room on a multiprocessor: where they had, with warps that pass on registers, results were seen to go wrong."""


def is_fit(x_TI: torch.Tensor, weight_OI: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the kernel takes these: sixteen-bit numbers, or float8 codes of inputs and weights."""
    num_out, num_in = weight_OI.shape
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and 0 < len(x_TI) <= MAX_TOKENS
        and out_dtype in (torch.bfloat16, torch.float16)
        and x_TI.dtype == weight_OI.dtype
        and x_TI.dtype in (out_dtype, torch.float8_e4m3fn)
        and num_out % 16 == 0
        and num_in > 0
        and x_TI.stride(1) == weight_OI.stride(1) == 1
        and all(x.stride(0) * x.itemsize % _ALIGNMENT == x.data_ptr() % _ALIGNMENT == 0 for x in (x_TI, weight_OI))
    )


def gemm_hopper(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    rounds: torch.Tensor,
    blocks: HopperBlocks,
    scales: Scales | None = None,
    *,
    gates: bool = False,
) -> None:
    """out = (x @ weight.T) * scales + bias, as `gemm` computes it.

    rounds: int32, zeros at first, as many as `gemm` has counters, of this layer and kernel alone: programs that share
    outputs count there, every product up to the next multiple of 64. Scales per group of 128 inputs lie in memory group
    by group, each with a multiple of four tokens; blocks of the weight have 128 outputs.
    gates: outputs are silu(first half) * second half instead, of halves rounded to the dtype of the outputs.
    """
    num_tokens, num_in = x_TI.shape
    num_out = len(weight_OI)
    step = LINE_BYTES // x_TI.itemsize
    num_turns = triton.cdiv(num_in, step)
    is_blockwise = scales is not None and min(scales.group_in, scales.block[1]) < num_in
    assert not gates or blocks.pieces == 2
    tiles = triton.cdiv(num_out, blocks.groups * blocks.pieces * PIECE)
    token_tiles = triton.cdiv(num_tokens, blocks.tokens)
    regions, partial = tiles * token_tiles * blocks.groups, out_TO
    splits = min(blocks.splits, num_turns) if regions <= rounds.numel() else 1
    if splits > 1:
        partial = x_TI.new_empty(regions * splits, blocks.pieces * PIECE * blocks.tokens, dtype=torch.float32)
    x_desc = _lines_of(x_TI, blocks.tokens, step)
    x_scale_desc = x_desc
    if is_blockwise:
        assert scales is not None and scales.group_in == step and scales.block == (128, step) and blocks.tokens >= 32
        of_tokens = scales.of_tokens_TG
        shape, strides = [of_tokens.shape[1], of_tokens.stride(1)], [of_tokens.stride(1), 1]
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        by_group = of_tokens.as_strided(shape, strides)
        x_scale_desc = TensorDescriptor(by_group, shape, strides, [1, blocks.tokens], layout)
    maximum, registers = _REGISTERS[blocks.groups]
    _gemm_hopper_kernel[(tiles * token_tiles * splits,)](
        x_desc,
        _lines_of(weight_OI, PIECE, step),
        _lines_of(out_TO, blocks.tokens, PIECE),
        x_scale_desc,
        out_TO if scales is None else scales.of_tokens_TG,
        out_TO if scales is None else scales.of_outputs,
        out_TO if bias_O is None else bias_O,
        out_TO,
        partial,
        rounds,
        num_tokens,
        num_out,
        num_turns,
        token_tiles,
        0 if scales is None else scales.of_tokens_TG.stride(0),
        0 if scales is None or scales.block[0] >= num_out else scales.of_outputs.stride(0),
        out_TO.stride(0) // 8,
        SPLITS=splits,
        GROUPS=blocks.groups,
        PIECES=blocks.pieces,
        STAGES=min(blocks.num_stages, stages_with_room(blocks, is_grouped=is_blockwise)),
        LINES=blocks.lines,
        CHUNK=chunk(blocks),
        SCALES=0 if scales is None else 2 if is_blockwise else 1,
        HAS_BIAS=bias_O is not None,
        GATES=gates,
        REGISTERS=registers,
        num_warps=4,
        maxnreg=maximum,
        launch_pdl=True,
    )


def _lines_of(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], box_layout(rows, columns, x.dtype))


@gluon.jit(**varying("num_tokens", "num_turns", "token_tiles", "x_scale_stride"))
def _gemm_hopper_kernel(
    x_desc,
    weight_desc,
    out_desc,
    x_scale_desc,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    round_ptr,
    num_tokens,
    num_out,
    num_turns,
    token_tiles,
    x_scale_stride,
    weight_scale_stride,
    out_eighths,
    SPLITS: gl.constexpr,
    GROUPS: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    LINES: gl.constexpr,
    CHUNK: gl.constexpr,
    SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """SCALES: 0 none, 1 per token and per output, 2 per 128 inputs of both. Programs that share outputs follow each
    other: those that started wait at most for one that is next."""
    split = gl.program_id(0) % SPLITS
    tile = gl.program_id(0) // SPLITS
    first_token = (tile % token_tiles) * x_desc.block_type.shape[0]
    first_turn = split * num_turns // SPLITS
    turns = (split + 1) * num_turns // SPLITS - first_turn
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    weight_smem = gl.allocate_shared_memory(
        weight_desc.dtype, [STAGES * GROUPS * PIECES, 64, weight_desc.block_type.shape[1]], weight_desc.layout
    )
    x_smem = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES, x_desc.block_type.shape[0], x_desc.block_type.shape[1]], x_desc.layout
    )
    x_scale_smem = x_smem
    if SCALES == 2:
        x_scale_smem = gl.allocate_shared_memory(
            gl.float32, [STAGES, 1, x_desc.block_type.shape[0]], x_scale_desc.layout
        )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    done = gl.allocate_shared_memory(gl.int64, [1, 1], bar_layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    mbarrier.init(done.index(0), count=GROUPS)
    fence_async_shared()
    gl.thread_barrier()

    work = (tile // token_tiles, tile, split, first_token, first_turn, turns, num_tokens, num_out)
    smem = (weight_smem, x_smem, x_scale_smem)
    barriers = (full, empty, done)
    scales = (x_scale_ptr, weight_scale_ptr, x_scale_stride, weight_scale_stride)
    results = (out_desc, bias_ptr, out_ptr, partial_ptr, round_ptr, out_eighths)
    sources = (x_desc, weight_desc, x_scale_desc)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 0, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (_load, (sources, work, smem, barriers, GROUPS, PIECES, LINES, SCALES, GATES)),
            ],
            [1],
            [24],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 0, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 1, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (_load, (sources, work, smem, barriers, GROUPS, PIECES, LINES, SCALES, GATES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 0, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 1, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (
                    _multiply,
                    (work, smem, barriers, scales, results, 2, GROUPS, PIECES, SPLITS, CHUNK, SCALES, HAS_BIAS, GATES),
                ),
                (_load, (sources, work, smem, barriers, GROUPS, PIECES, LINES, SCALES, GATES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@gluon.jit
def _first_output(tile, group, piece, num_out, GROUPS: gl.constexpr, PIECES: gl.constexpr, GATES: gl.constexpr):
    """Of the weight: of a group's pieces, the second has what the first's are the gates of, or what follows."""
    if GATES:
        found = (tile * GROUPS + group) * 64 + piece * (num_out // 2)
    else:
        found = ((tile * GROUPS + group) * PIECES + piece) * 64
    return found


@gluon.jit
def _load(
    sources,
    work,
    smem,
    barriers,
    GROUPS: gl.constexpr,
    PIECES: gl.constexpr,
    LINES: gl.constexpr,
    SCALES: gl.constexpr,
    GATES: gl.constexpr,
):
    """One warp: has blocks copied."""
    x_desc, weight_desc, x_scale_desc = sources
    tile, region, split, first_token, first_turn, turns, num_tokens, num_out = work
    weight_smem, x_smem, x_scale_smem = smem
    full, empty, done = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    STEP: gl.constexpr = x_smem.shape[2]
    num_bytes: gl.constexpr = (
        GROUPS * PIECES * weight_desc.block_type.nbytes
        + x_desc.block_type.nbytes
        + (x_scale_desc.block_type.nbytes if SCALES == 2 else 0)
    )
    # Lines that follow each other in memory are asked for together.
    ahead = gl.minimum(turns, STAGES)
    for first in range(0, ahead, LINES):
        for line in gl.static_range(LINES):
            if first + line < ahead:
                mbarrier.expect(full.index(first + line), num_bytes)
        for part in gl.static_range(GROUPS * PIECES):
            output = _first_output(tile, part // PIECES, part % PIECES, num_out, GROUPS, PIECES, GATES)
            for line in gl.static_range(LINES):
                turn = first + line
                if turn < ahead:
                    tma.async_copy_global_to_shared(
                        weight_desc,
                        [output, (first_turn + turn) * STEP],
                        full.index(turn),
                        weight_smem.index(turn * (GROUPS * PIECES) + part),
                    )
    gdc_wait()
    # Only now: never more than one kernel's programs wait beside those that run.
    gdc_launch_dependents()
    for turn in range(ahead):
        column = (first_turn + turn) * STEP
        tma.async_copy_global_to_shared(x_desc, [first_token, column], full.index(turn), x_smem.index(turn))
        if SCALES == 2:
            tma.async_copy_global_to_shared(
                x_scale_desc, [first_turn + turn, first_token], full.index(turn), x_scale_smem.index(turn)
            )
    for first in range(ahead, turns, LINES):
        for line in gl.static_range(LINES):
            turn = first + line
            if turn < turns:
                mbarrier.wait(empty.index(turn % STAGES), ((turn // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(turn % STAGES), num_bytes)
        for part in gl.static_range(GROUPS * PIECES):
            output = _first_output(tile, part // PIECES, part % PIECES, num_out, GROUPS, PIECES, GATES)
            for line in gl.static_range(LINES):
                turn = first + line
                stage = turn % STAGES
                if turn < turns:
                    tma.async_copy_global_to_shared(
                        weight_desc,
                        [output, (first_turn + turn) * STEP],
                        full.index(stage),
                        weight_smem.index(stage * (GROUPS * PIECES) + part),
                    )
        for line in gl.static_range(LINES):
            turn = first + line
            stage = turn % STAGES
            if turn < turns:
                column = (first_turn + turn) * STEP
                tma.async_copy_global_to_shared(x_desc, [first_token, column], full.index(stage), x_smem.index(stage))
                if SCALES == 2:
                    tma.async_copy_global_to_shared(
                        x_scale_desc, [first_turn + turn, first_token], full.index(stage), x_scale_smem.index(stage)
                    )


@gluon.jit
def _multiply(
    work,
    smem,
    barriers,
    scales,
    results,
    MINE: gl.constexpr,
    GROUPS: gl.constexpr,
    PIECES: gl.constexpr,
    SPLITS: gl.constexpr,
    CHUNK: gl.constexpr,
    SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATES: gl.constexpr,
):
    """Four warps: multiply one or two pieces of outputs."""
    tile, region, split, first_token, first_turn, turns, num_tokens, num_out = work
    weight_smem, x_smem, x_scale_smem = smem
    full, empty, done = barriers
    x_scale_ptr, weight_scale_ptr, x_scale_stride, weight_scale_stride = scales
    out_desc, bias_ptr, out_ptr, partial_ptr, round_ptr, out_eighths = results
    STAGES: gl.constexpr = x_smem.shape[0]
    TOKENS: gl.constexpr = x_smem.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, x_smem.shape[2] // 4])
    nothing = gl.zeros([64, TOKENS], gl.float32, layout=mma)
    total_0 = gl.zeros([64, TOKENS], gl.float32, layout=mma)
    total_1 = gl.zeros([64, TOKENS], gl.float32, layout=mma)
    output_0 = _first_output(tile, MINE, 0, num_out, GROUPS, PIECES, GATES)
    output_1 = _first_output(tile, MINE, PIECES - 1, num_out, GROUPS, PIECES, GATES)
    if SCALES == 2:
        last_block = (num_out - 1) // 128
        scale_ptr_0 = weight_scale_ptr + gl.minimum(output_0 // 128, last_block) * weight_scale_stride + first_turn
        scale_ptr_1 = weight_scale_ptr + gl.minimum(output_1 // 128, last_block) * weight_scale_stride + first_turn
        next_0 = gl.load(scale_ptr_0)
        next_1 = gl.load(scale_ptr_1)
    for turn in range(turns):
        stage = turn % STAGES
        slot = (stage * GROUPS + MINE) * PIECES
        if SCALES == 2:
            scale_0 = next_0
            scale_1 = next_1
            following = gl.minimum(turn + 1, turns - 1)
            next_0 = gl.load(scale_ptr_0 + following)
            next_1 = gl.load(scale_ptr_1 + following)
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        x = x_smem.index(stage).permute((1, 0))
        if SCALES == 0:
            total_0 = warpgroup_mma(weight_smem.index(slot), x, total_0, is_async=True)
            if PIECES == 2:
                total_1 = warpgroup_mma(weight_smem.index(slot + 1), x, total_1, is_async=True)
                total_0, total_1 = warpgroup_mma_wait(2, deps=[total_0, total_1])
            else:
                total_0 = warpgroup_mma_wait(1, deps=[total_0])
            # Of the turn before, everything is multiplied.
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=turn > 0)
        else:
            # Sums of the matrix units have fewer bits than float32: each line's are added to those of others here.
            products = warpgroup_mma(weight_smem.index(slot), x, nothing, use_acc=False, is_async=True)
            if PIECES == 2 and TOKENS <= 64:
                products_1 = warpgroup_mma(weight_smem.index(slot + 1), x, nothing, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(1, deps=[products])
            else:
                products = warpgroup_mma_wait(0, deps=[products])
            if SCALES == 2:
                total_0 += products * (x_scale_smem.index(stage).load(mma) * scale_0)
            else:
                total_0 += products
            if PIECES == 2:
                if TOKENS > 64:
                    products_1 = warpgroup_mma(weight_smem.index(slot + 1), x, nothing, use_acc=False, is_async=True)
                products_1 = warpgroup_mma_wait(0, deps=[products_1])
                if SCALES == 2:
                    # Read again: registers have no room for them meanwhile.
                    total_1 += products_1 * (x_scale_smem.index(stage).load(mma) * scale_1)
                else:
                    total_1 += products_1
            mbarrier.arrive(empty.index(stage))
    if SCALES == 0:
        if PIECES == 2:
            total_0, total_1 = warpgroup_mma_wait(0, deps=[total_0, total_1])
        else:
            total_0 = warpgroup_mma_wait(0, deps=[total_0])
    gdc_wait()
    of_outputs = (bias_ptr, weight_scale_ptr, x_scale_ptr, x_scale_stride, num_tokens, num_out)
    if SPLITS == 1:
        y = finished(total_0, output_0, first_token, of_outputs, 1, SCALES, HAS_BIAS, out_desc.dtype, mma)
        # Lines of tokens are room for results when all have done with them.
        mbarrier.arrive(done.index(0))
        mbarrier.wait(done.index(0), 0)
        out_smem = x_smem.index(MINE)._reinterpret(out_desc.dtype, out_desc.block_type.shape, out_desc.layout)
        if PIECES == 2:
            y_1 = finished(total_1, output_1, first_token, of_outputs, 1, SCALES, HAS_BIAS, out_desc.dtype, mma)
        if GATES:
            y = gated(y, y_1)
        out_smem.store(gl.permute(y, (1, 0)))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_token, output_0], out_smem)
        if PIECES == 2 and not GATES:
            tma.store_wait(pendings=0)
            out_smem.store(gl.permute(y_1, (1, 0)))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first_token, output_1], out_smem)
        tma.store_wait(pendings=0)
    else:
        own_region = region * GROUPS + MINE
        write_together(
            (total_0, total_1),
            (output_0, output_1),
            (split, first_token),
            of_outputs,
            (out_ptr, out_eighths),
            partial_ptr + own_region.to(gl.int64) * (SPLITS * PIECES * 64 * TOKENS),
            round_ptr + own_region,
            PIECES,
            SPLITS,
            CHUNK,
            SCALES,
            HAS_BIAS,
            GATES,
        )
