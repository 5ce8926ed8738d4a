"""What `gemm_hopper` makes of its sums: parts that programs leave for each other, and results. Knows no products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def write_together(
    totals,
    outputs,
    place,
    of_outputs,
    results,
    part_ptr,
    round_ptr,
    PIECES: gl.constexpr,
    SPLITS: gl.constexpr,
    CHUNK: gl.constexpr,
    SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATES: gl.constexpr,
):
    """Leaves sums for the other programs that have the same outputs; when all have, writes results of some tokens."""
    total_0, total_1 = totals
    output_0, output_1 = outputs
    split, first_token = place
    out_ptr, out_eighths = results
    num_tokens, num_out = of_outputs[4], of_outputs[5]
    TOKENS: gl.constexpr = total_0.shape[1]
    SIZE: gl.constexpr = 64 * TOKENS
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    own_ptr = part_ptr + split * (PIECES * SIZE)
    leave(own_ptr, total_0, num_tokens - first_token)
    if PIECES == 2:
        leave(own_ptr + SIZE, total_1, num_tokens - first_token)
    # Behind the barrier, what one thread releases covers the stores of all.
    gl.thread_barrier()
    # All together make a round full; the first split has what is left over.
    share = 64 // SPLITS + gl.where(split == 0, 64 % SPLITS, 0)
    count = gl.atomic_add(round_ptr, share, sem="acq_rel")
    full_count = (count & -64) + 64
    count += share
    while count - full_count < 0:
        count = gl.atomic_add(round_ptr, 0, sem="acquire")
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    inside = gl.arange(0, 64, layout=gl.SliceLayout(0, wide))
    stored = num_out // 2 if GATES else num_out
    for chunk in range(split, TOKENS // CHUNK, SPLITS):
        at_token = first_token + chunk * CHUNK
        chunk_ptr = part_ptr + chunk * (64 * CHUNK)
        y = added_up(chunk_ptr, num_tokens - at_token, SPLITS, PIECES * SIZE, CHUNK, wide)
        y = finished(y, output_0, at_token, of_outputs, 0, SCALES, HAS_BIAS, dtype, wide)
        if PIECES == 2:
            y_1 = added_up(chunk_ptr + SIZE, num_tokens - at_token, SPLITS, PIECES * SIZE, CHUNK, wide)
            y_1 = finished(y_1, output_1, at_token, of_outputs, 0, SCALES, HAS_BIAS, dtype, wide)
        if GATES:
            y = gated(y, y_1)
        token = at_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, wide))
        out_ptrs = out_ptr + token.to(gl.int64)[:, None] * (out_eighths * 8) + inside[None, :]
        is_token = (token < num_tokens)[:, None]
        gl.store(out_ptrs + output_0, y, mask=is_token & (output_0 + inside < stored)[None, :])
        if PIECES == 2 and not GATES:
            gl.store(out_ptrs + output_1, y_1, mask=is_token & (output_1 + inside < stored)[None, :])


@gluon.jit
def leave(ptr, part, num_tokens):
    """Stores [64, T] in the order in which threads of four warps hold it, so that each stores four numbers at a time:
    those of outputs o and o + 8 and of tokens 2 * t and 2 * t + 1."""
    TOKENS: gl.constexpr = part.shape[1]
    fours: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    part = gl.permute(gl.reshape(part, [4, 2, 8, TOKENS // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    part = gl.convert_layout(gl.reshape(part, [TOKENS * 16, 4]), fours)
    four = gl.arange(0, TOKENS * 16, layout=gl.SliceLayout(1, fours))
    inside = gl.arange(0, 4, layout=gl.SliceLayout(0, fours))
    is_token = (four // 128 * 8 < num_tokens)[:, None] & (inside >= 0)[None, :]
    gl.store(ptr + four[:, None] * 4 + inside[None, :], part, mask=is_token)


@gluon.jit
def added_up(ptr, num_tokens, SPLITS: gl.constexpr, SIZE: gl.constexpr, CHUNK: gl.constexpr, layout: gl.constexpr):
    """[CHUNK, 64]: of all parts, which are on their way before the first is added."""
    fours: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    four = gl.arange(0, CHUNK * 16, layout=gl.SliceLayout(1, fours))
    inside = gl.arange(0, 4, layout=gl.SliceLayout(0, fours))
    ptrs = ptr + four[:, None] * 4 + inside[None, :]
    is_token = (four // 128 * 8 < num_tokens)[:, None] & (inside >= 0)[None, :]
    parts = gl.tuple(())
    for index in gl.static_range(SPLITS):
        parts = parts + (gl.load(ptrs + index * SIZE, mask=is_token, other=0.0, cache_modifier=".cg"),)
    total = parts[0]
    for index in gl.static_range(1, SPLITS):
        total += parts[index]
    total = gl.permute(gl.reshape(total, [CHUNK // 8, 4, 8, 4, 2, 2]), (0, 3, 5, 1, 4, 2))
    return gl.convert_layout(gl.reshape(total, [CHUNK, 64]), layout)


@gluon.jit
def finished(
    total,
    output,
    first_token,
    of_outputs,
    TOKEN_AXIS: gl.constexpr,
    SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    dtype: gl.constexpr,
    layout: gl.constexpr,
):
    """Results of 64 outputs from the output on: sums with scales of outputs and tokens, and the bias, rounded."""
    bias_ptr, weight_scale_ptr, x_scale_ptr, x_scale_stride, num_tokens, num_out = of_outputs
    OUTPUT_AXIS: gl.constexpr = 1 - TOKEN_AXIS
    row = output + gl.arange(0, 64, layout=gl.SliceLayout(TOKEN_AXIS, layout))
    is_output = row < num_out
    if SCALES == 1:
        TOKENS: gl.constexpr = total.shape[TOKEN_AXIS]
        token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(OUTPUT_AXIS, layout))
        x_scale = gl.load(x_scale_ptr + token * x_scale_stride, mask=token < num_tokens, other=0.0)
        total *= gl.expand_dims(x_scale, OUTPUT_AXIS)
        total *= gl.expand_dims(gl.load(weight_scale_ptr + row, mask=is_output, other=0.0), TOKEN_AXIS)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row, mask=is_output, other=0.0).to(gl.float32)
        total += gl.expand_dims(bias, TOKEN_AXIS)
    return total.to(dtype)


@gluon.jit
def gated(gate, up):
    """silu(gate) * up"""
    x = gate.to(gl.float32)
    return (x / (1.0 + gl.exp(-x)) * up.to(gl.float32)).to(gate.dtype)
