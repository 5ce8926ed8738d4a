"""Draws for rows with min-p, top-k or top-p: a search for the least likely token that stays, then a race of the rest.

Nothing is sorted. How many tokens have a logit of at least some limit, and how much mass, falls as the limit rises;
each pass over the row measures three limits between the best ones known so far on either side, two of them where a
straight line through those two would put the one that is looked for. As soon as few tokens lie in between, they are
copied, and the search goes on among them. One program per row, whose passes find it in the cache if all rows fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.sampling import SamplingTensors
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.runtime import varying
from atom_cluster.ops.triton.sampling_noise import (
    load_key,
    load_limits,
    load_row,
    minus_log_exponential,
    uniform,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_UNBOUNDED = tl.constexpr(0)
_BOUNDED = tl.constexpr(1)
"""Values of BOUNDS."""
_COUNTS = tl.constexpr(0)
_MASSES = tl.constexpr(1)
"""Values of WEIGHS: what a total is."""
_ALL = tl.constexpr(2.0**30)
"""More tokens than any vocabulary has."""
_FAR = tl.constexpr(1e30)
"""No two logits are so far apart that one of them matters."""

FEWEST_PARTS = 128
"""That the kernels which look at all parts of a row have room for, so that the number of rows makes no other ones."""
_MOST_COPIED = 32 if runtime.INTERPRETED else 4096


def choose_truncated(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    key_SI: torch.Tensor,
) -> torch.Tensor:
    """Token ids, [S] int64. key_SI: keys of each row's parts; their largest names the token of rows that truncate
    nothing, and the likeliest one of others."""
    num_samples, num_parts = key_SI.shape
    out_S = key_SI.new_empty(num_samples)
    copied_SC = torch.empty(num_samples, _MOST_COPIED, dtype=torch.float32, device=logits_SV.device)
    if num_samples:
        _choose_kernel[(num_samples,)](
            logits_SV,
            logits_SV.stride(0),
            row_S,
            position_S,
            params.values,
            key_SI,
            copied_SC,
            out_S,
            logits_SV.shape[1],
            num_parts,
            PARTS=max(FEWEST_PARTS, triton.next_power_of_2(num_parts)),
            MOST_COPIED=_MOST_COPIED,
            LANES=64 if runtime.INTERPRETED else 1024,
            WIDTH=16 // logits_SV.element_size(),
            # The passes hold rows on their way in shared memory, of which AMD chips have less.
            STAGES=1 if runtime.INTERPRETED or runtime.is_hip() else 4,
            PTX=not (runtime.INTERPRETED or runtime.is_hip()),
            num_warps=16,
        )
    return out_S


@triton.jit(**varying("row_ptr", "position_ptr", "num_parts"))
def _choose_kernel(
    logits_ptr,
    stride,
    row_ptr,
    position_ptr,
    values_ptr,
    key_ptr,
    copied_ptr,
    out_ptr,
    vocab_size,
    num_parts,
    PARTS: tl.constexpr,
    MOST_COPIED: tl.constexpr,
    PTX: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    key = tl.max(tl.load(key_ptr + sample * num_parts + part, part < num_parts, other=-(2**63)))
    token_id = (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
    row_values_ptr, scale = load_row(row_ptr, values_ptr, sample)
    top_k, top_p, log_min_p, is_truncated = load_limits(row_values_ptr)
    logits_ptr += sample * stride
    copied_ptr += sample * MOST_COPIED
    bits = (key >> 32).to(tl.int32)
    top = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True) * scale
    if (scale > 0.0) & is_truncated & (tl.abs(top) < float("inf")):
        # Tokens above the limit stay, and of those at the limit as many as there is room for, lower ids first.
        limit = top + log_min_p
        room = tl.full((), _ALL, tl.float32)
        # How many tokens were copied, if all that are likely enough for top-k were; else 0.
        num_copied = tl.full((), 0, tl.int32)
        if (top_k > 0) & (top_k < vocab_size):
            lowest = tl.full((), float("-inf"), tl.float32)
            found, found_room, num_copied = _settle(
                logits_ptr,
                vocab_size,
                scale,
                top,
                lowest,
                room,
                top_k.to(tl.float32),
                copied_ptr,
                MOST_COPIED,
                _COUNTS,
                LANES,
                WIDTH,
                STAGES,
            )
            room = tl.where(found >= limit, found_room, room)
            limit = tl.maximum(found, limit)
        if top_p < 1.0:
            if num_copied > 0:
                above, at = _measure_around(copied_ptr, num_copied, 1.0, top, limit, LANES, 4, 1)
            else:
                above, at = _measure_around(logits_ptr, vocab_size, scale, top, limit, LANES, WIDTH, STAGES)
            weight = tl.exp2((limit - top) * _LOG2_E)
            target = top_p * (above + tl.minimum(room, at) * weight)
            if above < target:
                room = tl.minimum(room, tl.maximum(1.0, tl.ceil((target - above) / weight)))
            else:
                total = above + at * weight
                if num_copied > 0:
                    count = num_copied.to(tl.float32)
                    high = top + tl.abs(top) * 1e-6 + 1e-6
                    found, count, total, high, high_count, high_total, are_equal, is_open = _search(
                        copied_ptr, num_copied, 1.0, top, target, limit, count, total, high, 0.0, 0.0, 0.0, 0.0, 1.0,
                        _MASSES, _BOUNDED, LANES, 4, 1,
                    )  # fmt: skip
                    found_room = _room(top, target, found, count, high_count, high_total, are_equal, _MASSES)
                else:
                    found, found_room, num_copied = _settle(
                        logits_ptr,
                        vocab_size,
                        scale,
                        top,
                        limit,
                        total,
                        target,
                        copied_ptr,
                        MOST_COPIED,
                        _MASSES,
                        LANES,
                        WIDTH,
                        STAGES,
                    )
                room = tl.where(found > limit, found_room, tl.minimum(room, found_room))
                limit = found
        key_low, key_high = load_key(row_values_ptr, position_ptr, sample)
        token_id = _race(
            logits_ptr, vocab_size, scale, limit, room, key_low, key_high, token_id, PTX, LANES * WIDTH, STAGES
        )
    tl.store(out_ptr + sample, token_id.to(tl.int64))


@triton.jit
def _settle(
    logits_ptr,
    vocab_size,
    scale,
    top,
    low,
    low_total,
    target,
    copied_ptr,
    MOST_COPIED: tl.constexpr,
    WEIGHS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The highest limit at which the total of tokens is at least `target`, and for how many tokens at it there is room.
    Also how many tokens were copied, if those are all from some limit below that one on; else 0.

    A total is a number of tokens, or their mass if WEIGHS. low: a limit, perhaps -inf, whose total suffices;
    low_total: that total.
    """
    high = top + tl.abs(top) * 1e-6 + 1e-6
    low, low_count, low_total, high, high_count, high_total, are_equal, is_open = _search(
        logits_ptr, vocab_size, scale, top, target, low, _ALL, low_total, high, 0.0, 0.0, 0.0, 0.0, MOST_COPIED,
        WEIGHS, _UNBOUNDED, LANES, WIDTH, STAGES,
    )  # fmt: skip
    num_copied = tl.full((), 0, tl.int32)
    has_all = (low_count <= MOST_COPIED) & (low > float("-inf"))
    if is_open | has_all:
        # Few enough to be copied: all that are at least as likely, or those in between.
        base_count = tl.where(has_all, 0.0, high_count)
        base_total = tl.where(has_all, 0.0, high_total)
        num_copied = _copy(
            logits_ptr, vocab_size, scale, low, tl.where(has_all, float("inf"), high), copied_ptr, LANES, WIDTH, STAGES
        )
        tl.debug_barrier()
        if is_open:
            low, low_count, low_total, high, high_count, high_total, are_equal, is_open = _search(
                copied_ptr, num_copied, 1.0, top, target, low, low_count, low_total, high, high_count, high_total,
                base_count, base_total, 1.0, WEIGHS, _BOUNDED, LANES, 4, 1,
            )  # fmt: skip
    room = _room(top, target, low, low_count, high_count, high_total, are_equal, WEIGHS)
    return low, room, tl.where(has_all, num_copied, 0)


@triton.jit
def _room(top, target, low, low_count, high_count, high_total, are_equal, WEIGHS: tl.constexpr):
    """For how many tokens at the limit `low` there is room: all, if what a search ended with is not equal logits."""
    room = tl.full((), _ALL, tl.float32)
    if are_equal & (low_count - high_count > 1.0):
        weight = tl.exp2((low - top) * _LOG2_E) if WEIGHS else 1.0
        room = tl.maximum(1.0, tl.ceil((target - high_total) / weight))
    return room


@triton.jit
def _search(
    logits_ptr,
    vocab_size,
    scale,
    top,
    target,
    low,
    low_count,
    low_total,
    high,
    high_count,
    high_total,
    base_count,
    base_total,
    enough,
    WEIGHS: tl.constexpr,
    BOUNDS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Limits `low` and `high` with their counts and totals, of which only the first suffices, brought together until
    there are at most `enough` tokens in between, or only equal ones, or the first is exact; whether they are equal, and
    whether there is anything left to search for.

    BOUNDS: measure the least and the most logit in between as well, which ends the search early among few values.
    base_count, base_total: of tokens that are not among the logits, but above any limit.
    """
    low_count = tl.zeros((), tl.float32) + low_count
    high_count = tl.zeros((), tl.float32) + high_count
    high_total = tl.zeros((), tl.float32) + high_total
    step = tl.full((), 1.0, tl.float32)
    are_equal = high < low
    is_open = high > low
    goes_on = is_open
    while goes_on:
        if low == float("-inf"):
            first = top - 2.0 * step
            second = top - 5.0 * step
            third = top - 12.0 * step
            step *= 32.0
        else:
            first = 0.5 * low + 0.5 * high
            # Of many tokens in between the fraction looked for is where a line puts it, up to its fluctuation.
            width = high - low
            guess = low + width * ((low_total - target) / (low_total - high_total))
            spread = width * tl.minimum(0.25, tl.maximum(0.01, tl.rsqrt(low_count - high_count)))
            second = tl.minimum(tl.maximum(guess - spread, low), high)
            third = tl.minimum(tl.maximum(guess + spread, low), high)
        count_1, total_1, count_2, total_2, count_3, total_3, least, most = _measure(
            logits_ptr, vocab_size, scale, top, first, second, third, low, high, WEIGHS, BOUNDS, LANES, WIDTH, STAGES
        )
        low, low_count, low_total, high, high_count, high_total = _narrow(
            low, low_count, low_total, high, high_count, high_total, target, first,
            count_1 + base_count, total_1 + base_total,
        )  # fmt: skip
        low, low_count, low_total, high, high_count, high_total = _narrow(
            low, low_count, low_total, high, high_count, high_total, target, second,
            count_2 + base_count, total_2 + base_total,
        )  # fmt: skip
        low, low_count, low_total, high, high_count, high_total = _narrow(
            low, low_count, low_total, high, high_count, high_total, target, third,
            count_3 + base_count, total_3 + base_total,
        )  # fmt: skip
        low = tl.maximum(low, least)
        middle = 0.5 * low + 0.5 * high
        are_equal = (most <= low) | (middle <= low) | (middle >= high)
        is_open = (low_count - high_count > 1.0) & (are_equal == 0)
        if not WEIGHS:
            is_open = is_open & (low_total > target)
        goes_on = is_open & (low_count - high_count > enough)
        if low == float("-inf"):
            are_equal = high < low
            is_open = high < low
            goes_on = step < _FAR
    return low, low_count, low_total, high, high_count, high_total, are_equal, is_open


@triton.jit
def _copy(
    logits_ptr, vocab_size, scale, low, high, copied_ptr, LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr
):
    """Writes the logits in [low, high), divided by temperature, one behind the other; their number."""
    offset = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    num_copied = tl.full((), 0, tl.int32)
    for start in tl.range(0, vocab_size, LANES * WIDTH, num_stages=STAGES):
        index = start + offset
        scaled = tl.load(logits_ptr + index, index < vocab_size, other=float("-inf")).to(tl.float32) * scale
        is_between = ((scaled >= low) & (scaled < high)).to(tl.int32)
        lane_count = tl.sum(is_between, axis=1)
        place = num_copied + (tl.cumsum(lane_count) - lane_count)[:, None] + tl.cumsum(is_between, axis=1) - 1
        tl.store(copied_ptr + place, scaled, is_between > 0)
        num_copied += tl.sum(lane_count)
    return num_copied


@triton.jit
def _narrow(low, low_count, low_total, high, high_count, high_total, target, limit, count, total):
    is_low = (total >= target) & (limit >= low)
    is_high = (total < target) & (limit <= high)
    return (
        tl.where(is_low, limit, low),
        tl.where(is_low, count, low_count),
        tl.where(is_low, total, low_total),
        tl.where(is_high, limit, high),
        tl.where(is_high, count, high_count),
        tl.where(is_high, total, high_total),
    )


@triton.jit
def _measure(
    logits_ptr,
    vocab_size,
    scale,
    top,
    first,
    second,
    third,
    low,
    high,
    WEIGHS: tl.constexpr,
    BOUNDS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Number and total of the tokens at or above each of three limits; with BOUNDS the least and the most logit in
    [low, high), else these limits."""
    offset = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    count_1 = tl.zeros((LANES,), tl.float32)
    count_2 = tl.zeros((LANES,), tl.float32)
    count_3 = tl.zeros((LANES,), tl.float32)
    total_1 = tl.zeros((LANES,), tl.float32)
    total_2 = tl.zeros((LANES,), tl.float32)
    total_3 = tl.zeros((LANES,), tl.float32)
    least = tl.full((LANES,), float("inf"), tl.float32)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    for start in tl.range(0, vocab_size, LANES * WIDTH, num_stages=STAGES):
        index = start + offset
        scaled = tl.load(logits_ptr + index, index < vocab_size, other=float("-inf")).to(tl.float32) * scale
        count_1 += tl.sum(tl.where(scaled >= first, 1.0, 0.0), axis=1)
        count_2 += tl.sum(tl.where(scaled >= second, 1.0, 0.0), axis=1)
        count_3 += tl.sum(tl.where(scaled >= third, 1.0, 0.0), axis=1)
        if WEIGHS:
            weight = tl.exp2((scaled - top) * _LOG2_E)
            total_1 += tl.sum(tl.where(scaled >= first, weight, 0.0), axis=1)
            total_2 += tl.sum(tl.where(scaled >= second, weight, 0.0), axis=1)
            total_3 += tl.sum(tl.where(scaled >= third, weight, 0.0), axis=1)
        if BOUNDS:
            is_between = (scaled >= low) & (scaled < high)
            least = tl.minimum(least, tl.min(tl.where(is_between, scaled, float("inf")), axis=1))
            most = tl.maximum(most, tl.max(tl.where(is_between, scaled, float("-inf")), axis=1))
    if not WEIGHS:
        total_1 = count_1
        total_2 = count_2
        total_3 = count_3
    return (
        tl.sum(count_1),
        tl.sum(total_1),
        tl.sum(count_2),
        tl.sum(total_2),
        tl.sum(count_3),
        tl.sum(total_3),
        tl.min(least) if BOUNDS else low,
        tl.max(most) if BOUNDS else high,
    )


@triton.jit
def _measure_around(
    logits_ptr, vocab_size, scale, top, limit, LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr
):
    """Mass of the tokens above a limit, and the number of those at it."""
    offset = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    above = tl.zeros((LANES,), tl.float32)
    at = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, vocab_size, LANES * WIDTH, num_stages=STAGES):
        index = start + offset
        scaled = tl.load(logits_ptr + index, index < vocab_size, other=float("-inf")).to(tl.float32) * scale
        above += tl.sum(tl.where(scaled > limit, tl.exp2((scaled - top) * _LOG2_E), 0.0), axis=1)
        at += tl.sum(tl.where((scaled == limit) & (index < vocab_size), 1.0, 0.0), axis=1)
    return tl.sum(above), tl.sum(at)


@triton.jit
def _race(
    logits_ptr,
    vocab_size,
    scale,
    limit,
    room,
    key_low,
    key_high,
    token_id,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The winner among the tokens that stay; `token_id` if there is none."""
    lane_id = tl.arange(0, BLOCK)
    lane_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    num_at_limit = 0.0
    for start in tl.range(0, vocab_size, BLOCK, num_stages=STAGES):
        index = start + tl.arange(0, BLOCK)
        scaled = tl.load(logits_ptr + index, index < vocab_size, other=float("-inf")).to(tl.float32) * scale
        scaled = tl.where(scaled >= limit, scaled, float("-inf"))
        if room < _ALL:
            is_at_limit = tl.where(scaled == limit, 1.0, 0.0)
            num_at_limit += tl.sum(is_at_limit)
            if num_at_limit > room:
                order = tl.cumsum(is_at_limit) + (num_at_limit - tl.sum(is_at_limit))
                scaled = tl.where((scaled == limit) & (order > room), float("-inf"), scaled)
        if tl.max(scaled) > float("-inf"):
            score = scaled + minus_log_exponential(uniform(index, key_low, key_high), PTX)
            lane_id = tl.where(score > lane_best, index, lane_id)
            lane_best = tl.maximum(score, lane_best)
    best = tl.max(lane_best)
    return tl.where(best > float("-inf"), tl.min(tl.where(lane_best == best, lane_id, vocab_size - 1)), token_id)
