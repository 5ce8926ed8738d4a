"""The gated delta rule by chunks of 64 tokens, for rows of many: matrix products in place of steps. Knows no layers.

Within a chunk token i learns beta_i (v_i - k_i^T S_i), where S_i holds what all before it learnt: a unit triangular
system, the same for all value dims. Two kernels set it up and solve it for all chunks at once; a third goes through
the chunks of a row, with some value dims of one head's state in registers. Of normed keys and queries only the lengths
are kept, as factors of rows. Shape suffixes as in `ops.gated_delta`, and L tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.gated_delta import Gates, StateMetadata
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.gated_delta_step import gates_of
from atom_cluster.ops.triton.runtime import varying

CHUNK_TOKENS = 64
"""Tokens whose updates are found together: work within a chunk grows with its square."""

_NUM_FACTORS = 5
_HOPPER_SHARED_BYTES = 215_000


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows that go in chunks."""

    num_chunks: int
    num_rows: int
    chunks: torch.Tensor
    """[num_chunks, 4] int32, flat: row, first token of the chunk, first token of the row, and the one behind it."""
    rows: torch.Tensor
    """[num_rows, 4] int32, flat: row, the first of its chunks, which follow each other, and its tokens as above."""


def run_chunks(
    query_TGK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_THV: torch.Tensor,
    gates: Gates,
    state_NHKV: torch.Tensor,
    output_THV: torch.Tensor,
    chunks: Chunks,
    states: StateMetadata,
) -> None:
    """Writes the outputs of the rows' tokens, and their last states into their pages."""
    num_heads, value_dim = value_THV.shape[1:]
    num_key_heads, key_dim = key_TGK.shape[1:]
    shape = (chunks.num_chunks, num_heads, CHUNK_TOKENS)
    system = torch.empty((*shape, CHUNK_TOKENS), dtype=torch.float32, device=value_THV.device)
    solution = torch.empty((*shape, CHUNK_TOKENS), dtype=value_THV.dtype, device=value_THV.device)
    scores = torch.empty_like(solution)
    factors = torch.empty((*shape, _NUM_FACTORS), dtype=torch.float32, device=value_THV.device)
    dims = {
        "GROUP": num_heads // num_key_heads,
        "KEY_DIM": key_dim,
        "KEY_BLOCK": max(16, triton.next_power_of_2(key_dim)),
        "CHUNK": CHUNK_TOKENS,
    }
    strides = (query_TGK.stride(0), query_TGK.stride(1), key_TGK.stride(0), key_TGK.stride(1))
    _compare_kernel[(num_key_heads, chunks.num_chunks)](
        query_TGK,
        key_TGK,
        gates.decay_TH,
        gates.learn_TH,
        gates.log_rate_H,
        gates.decay_bias_H,
        system,
        scores,
        factors,
        chunks.chunks,
        *strides,
        gates.decay_TH.stride(0),
        gates.learn_TH.stride(0),
        key_dim**-0.5,
        **dims,
        num_warps=4,
    )
    is_exact = value_THV.dtype == torch.float32 or runtime.is_hip()
    _solve_kernel[(chunks.num_chunks * num_heads,)](
        system,
        factors,
        solution,
        CHUNK=CHUNK_TOKENS,
        PRECISION="ieee" if is_exact else "tf32x3",
        num_warps=1,
    )
    value_block, num_warps, num_stages = _options(chunks.num_rows * num_heads, dims["KEY_BLOCK"], value_THV)
    _pass_kernel[(triton.cdiv(value_dim, value_block), num_heads, chunks.num_rows)](
        query_TGK,
        key_TGK,
        value_THV,
        solution,
        scores,
        factors,
        state_NHKV,
        output_THV,
        chunks.rows,
        states.read_page,
        states.write_page,
        states.write_page.stride(0),
        *strides,
        value_THV.stride(0),
        value_THV.stride(1),
        state_NHKV.stride(0),
        VALUE_DIM=value_dim,
        VALUE_BLOCK=value_block,
        **dims,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _options(num_states: int, key_block: int, value_THV: torch.Tensor) -> tuple[int, int, int]:
    """(value dims of a block, warps, stages) of the pass through the chunks.

    Wide blocks read less, narrow ones give few rows more multiprocessors. More warps only wait for each other. Stages
    are what shared memory holds of a chunk's keys, queries, matrices and values.
    """
    value_dim, size = value_THV.shape[2], value_THV.element_size()
    has_many = num_states * triton.cdiv(value_dim, 64) >= 2 * runtime.num_multiprocessors(value_THV.device)
    is_wide = has_many and size == 2 and runtime.is_hopper()
    block = min(64 if is_wide else 32, max(16, triton.next_power_of_2(value_dim)))
    if size == 2 and runtime.is_hopper():
        stage_bytes = CHUNK_TOKENS * (2 * key_block + 2 * CHUNK_TOKENS + block) * size
        return block, 4, max(2, min(4, _HOPPER_SHARED_BYTES // stage_bytes))
    return block, 4, 2 if size == 2 and runtime.is_hip() and key_block <= 128 else 1


@triton.jit
def _compare_kernel(
    query_ptr,
    key_ptr,
    decay_ptr,
    learn_ptr,
    log_rate_ptr,
    decay_bias_ptr,
    system_ptr,
    scores_ptr,
    factors_ptr,
    chunks_ptr,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    decay_stride,
    learn_stride,
    scale,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of one chunk and the value heads of one key head: the system's matrix below its diagonal, scores, and factors:

    0: of k^T S (what is left of S, at a token), 1: of q^T S, 2: of what is learnt (what is left of it behind the
    chunk), 3: of S (what is left of it behind the chunk), 4: the share that is learnt.
    """
    key_head = tl.program_id(0)
    num_heads = tl.num_programs(0) * GROUP
    chunk = tl.program_id(1)
    start = tl.load(chunks_ptr + 4 * chunk + 1)
    end = tl.load(chunks_ptr + 4 * chunk + 3)
    i = tl.arange(0, CHUNK)
    k = tl.arange(0, KEY_BLOCK)
    token = (start + i).to(tl.int64)
    is_token = token < end
    is_inside = is_token[:, None] & (k < KEY_DIM)[None, :]
    key_ptrs = key_ptr + token[:, None] * key_stride + key_head * key_head_stride + k[None, :]
    query_ptrs = query_ptr + token[:, None] * query_stride + key_head * query_head_stride + k[None, :]
    key = tl.load(key_ptrs, is_inside, other=0.0)
    query = tl.load(query_ptrs, is_inside, other=0.0)
    wide_key, wide_query = key.to(tl.float32), query.to(tl.float32)
    key_factor = tl.rsqrt(tl.sum(wide_key * wide_key, axis=1) + 1e-6)
    query_factor = tl.rsqrt(tl.sum(wide_query * wide_query, axis=1) + 1e-6) * scale
    key_by_key = tl.dot(key, tl.trans(key), input_precision="ieee") * key_factor[:, None] * key_factor[None, :]
    query_by_key = tl.dot(query, tl.trans(key), input_precision="ieee") * query_factor[:, None] * key_factor[None, :]
    for member in range(GROUP):
        head = key_head * GROUP + member
        decay = tl.load(decay_ptr + token * decay_stride + head, is_token, other=0.0)
        learn = tl.load(learn_ptr + token * learn_stride + head, is_token, other=0.0)
        decay, learn = gates_of(decay, learn, tl.load(log_rate_ptr + head), tl.load(decay_bias_ptr + head))
        decay, learn = tl.where(is_token, decay, 0.0), tl.where(is_token, learn, 0.0)
        left = tl.cumsum(decay, axis=0)
        left_last = tl.sum(decay, axis=0)
        # What is left at token i of what token j learnt.
        left_since = tl.exp(tl.minimum(left[:, None] - left[None, :], 0.0))
        at = chunk.to(tl.int64) * num_heads + head
        square = at * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
        below = tl.where(i[:, None] > i[None, :], key_by_key * left_since * learn[:, None], 0.0)
        tl.store(system_ptr + square, below)
        tl.store(scores_ptr + square, tl.where(i[:, None] >= i[None, :], query_by_key * left_since, 0.0))
        factor_ptrs = factors_ptr + at * CHUNK * 5 + i
        tl.store(factor_ptrs, tl.exp(left) * key_factor)
        tl.store(factor_ptrs + CHUNK, tl.exp(left) * query_factor)
        tl.store(factor_ptrs + 2 * CHUNK, tl.exp(left_last - left) * key_factor)
        tl.store(factor_ptrs + 3 * CHUNK, tl.exp(left_last) + tl.zeros([CHUNK], tl.float32))
        tl.store(factor_ptrs + 4 * CHUNK, learn)


@triton.jit
def _solve_kernel(system_ptr, factors_ptr, solution_ptr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Of one chunk and head: the inverse of the system, its columns multiplied by what is learnt of each token.

    Blocks of 16 on the diagonal are inverted row by row, which is exact whatever the keys: powers of a block may be
    large where keys are alike, and would cancel. The blocks below follow from them.
    """
    at = tl.program_id(0).to(tl.int64)
    tl.static_assert(CHUNK == 64)
    system_ptr += at * CHUNK * CHUNK
    solution_ptr += at * CHUNK * CHUNK
    factors_ptr += at * CHUNK * 5 + 4 * CHUNK
    a11, a22 = -_block(system_ptr, 0, 0, CHUNK), -_block(system_ptr, 1, 1, CHUNK)
    a33, a44 = -_block(system_ptr, 2, 2, CHUNK), -_block(system_ptr, 3, 3, CHUNK)
    for row in range(2, 16):
        a11 = _with_row_solved(a11, system_ptr, 0, row, CHUNK)
        a22 = _with_row_solved(a22, system_ptr, 1, row, CHUNK)
        a33 = _with_row_solved(a33, system_ptr, 2, row, CHUNK)
        a44 = _with_row_solved(a44, system_ptr, 3, row, CHUNK)
    i = tl.arange(0, 16)
    is_diagonal = i[:, None] == i[None, :]
    a11, a22 = tl.where(is_diagonal, 1.0, a11), tl.where(is_diagonal, 1.0, a22)
    a33, a44 = tl.where(is_diagonal, 1.0, a33), tl.where(is_diagonal, 1.0, a44)
    b21, b32 = _block(system_ptr, 1, 0, CHUNK), _block(system_ptr, 2, 1, CHUNK)
    b31, b43 = _block(system_ptr, 2, 0, CHUNK), _block(system_ptr, 3, 2, CHUNK)
    b42, b41 = _block(system_ptr, 3, 1, CHUNK), _block(system_ptr, 3, 0, CHUNK)
    a21 = -_times(a22, _times(b21, a11, PRECISION), PRECISION)
    a32 = -_times(a33, _times(b32, a22, PRECISION), PRECISION)
    a43 = -_times(a44, _times(b43, a33, PRECISION), PRECISION)
    a31 = -_times(a33, _times(b31, a11, PRECISION) + _times(b32, a21, PRECISION), PRECISION)
    a42 = -_times(a44, _times(b42, a22, PRECISION) + _times(b43, a32, PRECISION), PRECISION)
    rest = _times(b41, a11, PRECISION) + _times(b42, a21, PRECISION) + _times(b43, a31, PRECISION)
    a41 = -_times(a44, rest, PRECISION)
    learn1, learn2 = tl.load(factors_ptr + i)[None, :], tl.load(factors_ptr + 16 + i)[None, :]
    learn3, learn4 = tl.load(factors_ptr + 32 + i)[None, :], tl.load(factors_ptr + 48 + i)[None, :]
    _store_block(solution_ptr, 0, 0, a11 * learn1, CHUNK)
    _store_block(solution_ptr, 1, 0, a21 * learn1, CHUNK)
    _store_block(solution_ptr, 2, 0, a31 * learn1, CHUNK)
    _store_block(solution_ptr, 3, 0, a41 * learn1, CHUNK)
    _store_block(solution_ptr, 1, 1, a22 * learn2, CHUNK)
    _store_block(solution_ptr, 2, 1, a32 * learn2, CHUNK)
    _store_block(solution_ptr, 3, 1, a42 * learn2, CHUNK)
    _store_block(solution_ptr, 2, 2, a33 * learn3, CHUNK)
    _store_block(solution_ptr, 3, 2, a43 * learn3, CHUNK)
    _store_block(solution_ptr, 3, 3, a44 * learn4, CHUNK)
    zero = tl.zeros([16, 16], tl.float32)
    for row in tl.static_range(3):
        for column in tl.static_range(row + 1, 4):
            _store_block(solution_ptr, row, column, zero, CHUNK)


@triton.jit
def _block(matrix_ptr, row, column, CHUNK: tl.constexpr):
    i = tl.arange(0, 16)
    return tl.load(matrix_ptr + (row * 16 + i)[:, None] * CHUNK + column * 16 + i[None, :])


@triton.jit
def _store_block(matrix_ptr, row, column, block, CHUNK: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(matrix_ptr + (row * 16 + i)[:, None] * CHUNK + column * 16 + i[None, :], block)


@triton.jit
def _with_row_solved(found, system_ptr, index, row, CHUNK: tl.constexpr):
    """`found` has the inverse of a diagonal block, but for the diagonal, in the rows above; below, minus the block."""
    i = tl.arange(0, 16)
    minus_row = -tl.load(system_ptr + (index * 16 + row) * CHUNK + index * 16 + i)
    solved = minus_row + tl.sum(minus_row[:, None] * found, axis=0)
    return tl.where((i == row)[:, None], solved[None, :], found)


@triton.jit
def _times(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(**varying("rows_ptr", "read_page_ptr", "write_page_ptr"))
def _pass_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    solution_ptr,
    scores_ptr,
    factors_ptr,
    state_ptr,
    output_ptr,
    rows_ptr,
    read_page_ptr,
    write_page_ptr,
    write_page_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_stride,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Some value dims of one head of one row, chunk by chunk."""
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    rows_ptr += 4 * tl.program_id(2)
    row = tl.load(rows_ptr)
    first_chunk = tl.load(rows_ptr + 1).to(tl.int64)
    start = tl.load(rows_ptr + 2)
    end = tl.load(rows_ptr + 3)
    i = tl.arange(0, CHUNK)
    k = tl.arange(0, KEY_BLOCK)
    v = tl.program_id(0) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_k, has_v = k < KEY_DIM, v < VALUE_DIM
    in_state = has_k[:, None] & has_v[None, :]
    state_ptrs = state_ptr + head * KEY_DIM * VALUE_DIM + k[:, None] * VALUE_DIM + v[None, :]
    page = tl.load(read_page_ptr + row).to(tl.int64)
    state = tl.load(state_ptrs + page * page_stride, in_state & (page >= 0), other=0.0)

    query_ptr += (head // GROUP) * query_head_stride
    key_ptr += (head // GROUP) * key_head_stride
    square = i[:, None] * CHUNK + i[None, :]
    for chunk in range(tl.cdiv(end - start, CHUNK)):
        token = (start + chunk * CHUNK + i).to(tl.int64)
        is_token = token < end
        is_inside = is_token[:, None] & has_k[None, :]
        key = tl.load(key_ptr + token[:, None] * key_stride + k[None, :], is_inside, other=0.0)
        query = tl.load(query_ptr + token[:, None] * query_stride + k[None, :], is_inside, other=0.0)
        in_values = is_token[:, None] & has_v[None, :]
        value_ptrs = value_ptr + token[:, None] * value_stride + head * value_head_stride + v[None, :]
        value = tl.load(value_ptrs, in_values, other=0.0)
        at = (first_chunk + chunk) * num_heads + head
        solution = tl.load(solution_ptr + at * CHUNK * CHUNK + square)
        scores = tl.load(scores_ptr + at * CHUNK * CHUNK + square)
        of_recalled = tl.load(factors_ptr + at * CHUNK * 5 + i)
        of_asked = tl.load(factors_ptr + at * CHUNK * 5 + CHUNK + i)
        of_learnt = tl.load(factors_ptr + at * CHUNK * 5 + 2 * CHUNK + i)
        of_state = tl.load(factors_ptr + at * CHUNK * 5 + 3 * CHUNK)

        narrow = state.to(key.dtype)
        recalled = tl.dot(key, narrow, input_precision="ieee") * of_recalled[:, None]
        asked = tl.dot(query, narrow, input_precision="ieee") * of_asked[:, None]
        learnt = tl.dot(solution, (value.to(tl.float32) - recalled).to(key.dtype), input_precision="ieee")
        output = tl.dot(scores, learnt.to(key.dtype), acc=asked, input_precision="ieee")
        output_ptrs = output_ptr + (token[:, None] * num_heads + head) * VALUE_DIM + v[None, :]
        tl.store(output_ptrs, output, in_values)
        kept = (learnt * of_learnt[:, None]).to(key.dtype)
        state = tl.dot(tl.trans(key), kept, acc=state * of_state, input_precision="ieee")
    page = tl.load(write_page_ptr + row * write_page_stride).to(tl.int64)
    tl.store(state_ptrs + page * page_stride, state, in_state)
