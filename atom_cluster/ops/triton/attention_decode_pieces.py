"""The end of a row for `attention_decode_hopper`: what its warps found made one, and what several programs found.

Every program with a piece of a row stores it; the one that comes last reads all of them. Knows no keys and no values.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def finish_row(
    found,
    where,
    sink_ptr,
    value_scale,
    results,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    HAS_SINK: gl.constexpr,
):
    """Store a row's result, or a piece of it, and with the last piece the result."""
    mixed_smem, line_smem = found
    row, block, until, row_begin, row_end, token, num_queries, kv_head, first_part, num_pieces = where
    out_ptr, piece_ptr, weight_ptr, arrived_ptr = results
    warps: gl.constexpr = gl.num_warps()
    lanes: gl.constexpr = min(32, D // 4)
    # That are read together: as many numbers as there is room for.
    PIECES: gl.constexpr = max(1, 8192 // (ROWS * D))
    many: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])
    layout: gl.constexpr = gl.SliceLayout(0, many)
    line: gl.constexpr = gl.SliceLayout(1, layout)
    m = gl.arange(0, ROWS, layout=line)
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, layout))[None, :]
    is_query = m < num_queries * GROUP
    tops = line_smem.index(0).slice(0, ROWS, 1).load(gl.SliceLayout(2, many))
    sums = line_smem.index(1).slice(0, ROWS, 1).load(gl.SliceLayout(2, many))
    top = gl.max(tops, axis=0)
    of_warps = gl.exp2(tops - top[None, :])
    sums = gl.convert_layout(gl.sum(sums * of_warps, axis=0), line)
    top = gl.convert_layout(top, line)
    acc = gl.sum(mixed_smem.load(many) * of_warps[:, :, None], axis=0)
    is_done = (block == row_begin) & (until == row_end)
    if not is_done:
        num_kv_heads = gl.num_programs(0)
        # A part has at most two: of a row that began before it, and of one that goes on behind it.
        piece = 2 * gl.program_id(1) + (block == row_begin).to(gl.int32)
        at = (piece * num_kv_heads + kv_head) * ROWS + m
        gl.store(piece_ptr + at.to(gl.int64)[:, None] * D + dim, acc, mask=is_query[:, None])
        gl.store(weight_ptr + at * 2, top, mask=is_query)
        gl.store(weight_ptr + at * 2 + 1, sums, mask=is_query)
        gl.thread_barrier()
        arrived_ptr += row * num_kv_heads + kv_head
        is_done = gl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_pieces - 1
        if is_done:
            gl.store(arrived_ptr, 0)
            acc = gl.zeros([ROWS, D], gl.float32, layout=layout)
            piece_line: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, many))
            piece_m = gl.arange(0, ROWS, layout=piece_line)[None, :]
            all_sums = gl.zeros([ROWS], gl.float32, layout=piece_line)
            all_top = gl.full([ROWS], -1.0e30, gl.float32, layout=piece_line)
            index = gl.arange(0, PIECES, layout=gl.SliceLayout(1, gl.SliceLayout(2, many)))
            for first in range(0, num_pieces, PIECES):
                number = first + index
                place = 2 * (first_part + number) + (number == 0).to(gl.int32)
                piece_at = ((place * num_kv_heads + kv_head) * ROWS)[:, None] + piece_m
                is_piece = (number < num_pieces)[:, None] & (piece_m < num_queries * GROUP)
                piece_top = gl.load(weight_ptr + piece_at * 2, mask=is_piece, other=-1.0e30, cache_modifier=".cg")
                piece_sums = gl.load(weight_ptr + piece_at * 2 + 1, mask=is_piece, other=0.0, cache_modifier=".cg")
                pieces = gl.load(
                    piece_ptr + piece_at.to(gl.int64)[:, :, None] * D + dim[None, :, :],
                    mask=is_piece[:, :, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_top = gl.maximum(all_top, gl.max(piece_top, axis=0))
                share = gl.exp2(piece_top - new_top[None, :])
                kept = gl.exp2(all_top - new_top)
                mixed = gl.sum(pieces * share[:, :, None], axis=0)
                acc = acc * gl.convert_layout(kept, line)[:, None] + mixed
                all_sums = all_sums * kept + gl.sum(piece_sums * share, axis=0)
                all_top = new_top
            top = gl.convert_layout(all_top, line)
            sums = gl.convert_layout(all_sums, line)
    if is_done:
        head = kv_head * GROUP + m % GROUP
        if HAS_SINK:
            sink = gl.load(sink_ptr + head, mask=is_query, other=0.0).to(gl.float32) * 1.4426950408889634
            new_top = gl.maximum(top, sink)
            kept = gl.exp2(top - new_top)
            sums = sums * kept + gl.exp2(sink - new_top)
            acc = acc * kept[:, None]
        acc = acc * (value_scale / gl.where(sums > 0.0, sums, 1.0))[:, None]
        out_row = ((token + m // GROUP).to(gl.int64) * (gl.num_programs(0) * GROUP) + head) * D
        gl.store(out_ptr + out_row[:, None] + dim, acc.to(out_ptr.dtype.element_ty), mask=is_query[:, None])
