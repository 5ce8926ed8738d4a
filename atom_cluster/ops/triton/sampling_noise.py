"""The noise of `torch_ref/noise.py` as functions for kernels: the same integers, and floats equal up to rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from atom_cluster.ops.sampling import NUM_COLUMNS, Column

_COLUMNS = tl.constexpr(int(NUM_COLUMNS))
_INVERSE_TEMPERATURE = tl.constexpr(int(Column.INVERSE_TEMPERATURE))
_TOP_K = tl.constexpr(int(Column.TOP_K))
_TOP_P = tl.constexpr(int(Column.TOP_P))
_LOG_MIN_P = tl.constexpr(int(Column.LOG_MIN_P))
_SEED_LOW = tl.constexpr(int(Column.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Column.SEED_HIGH))
_NUM_PROMPT_TOKENS = tl.constexpr(int(Column.NUM_PROMPT_TOKENS))

_STRIDE = tl.constexpr(0x9E3779B1)
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_row(row_ptr, values_ptr, sample):
    """Where the numbers of a sample's row are, and its inverse temperature."""
    row_values_ptr = values_ptr + tl.load(row_ptr + sample) * _COLUMNS
    return row_values_ptr, tl.load(row_values_ptr + _INVERSE_TEMPERATURE).to(tl.float32, bitcast=True)


@triton.jit
def load_limits(row_values_ptr):
    """(top-k, top-p, log of min-p) of a row, and whether one of them removes tokens."""
    top_k = tl.load(row_values_ptr + _TOP_K)
    top_p = tl.load(row_values_ptr + _TOP_P).to(tl.float32, bitcast=True)
    log_min_p = tl.load(row_values_ptr + _LOG_MIN_P).to(tl.float32, bitcast=True)
    return top_k, top_p, log_min_p, (top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf"))


@triton.jit
def load_key(row_values_ptr, position_ptr, sample):
    """Both words of a sample's key."""
    position = tl.load(position_ptr + sample).to(tl.int32) - tl.load(row_values_ptr + _NUM_PROMPT_TOKENS)
    low = tl.load(row_values_ptr + _SEED_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(row_values_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True)
    low = _mix(position.to(tl.uint32, bitcast=True) * _STRIDE + low)
    return low, _mix(low + high)


@triton.jit
def uniform(token_ids, key_low, key_high):
    """Numbers in (0, 1] for int32 ids, float32 with full relative precision at the low end."""
    x = token_ids.to(tl.uint32, bitcast=True) * _STRIDE + key_low
    x = ((x ^ (x >> 16)) * _MIX_1) ^ key_high
    x = (x ^ (x >> 13)) * _MIX_2
    x = (x ^ (x >> 16)) & 0x7FFFFFFF
    return (x.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10


@triton.jit
def minus_log_exponential(uniform, PTX: tl.constexpr):
    """-log(e), e the exponential variable -log(1 - uniform); to about 3e-6. PTX: whether it is compiled for NVIDIA."""
    # Near 0 the logarithm of 1 - uniform has no low end; its series has.
    series = uniform * (1 / 6) + 0.2
    series = series * uniform + 0.25
    series = series * uniform + (1 / 3)
    series = series * uniform + 0.5
    series = series * uniform * uniform + uniform
    exponential = tl.where(uniform < 0.0625, series, _log2(1.0 - uniform, PTX) * -_LN_2)
    return _log2(exponential, PTX) * -_LN_2


@triton.jit
def _log2(x, PTX: tl.constexpr):
    """Of normal numbers, by the chip's own instruction: on NVIDIA `tl.log2` is a polynomial of thirty."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 13)) * _MIX_2
    return x ^ (x >> 16)
