"""Random numbers as a pure function of (seed, output position, token id), computed on any device without generators.

So a request's tokens do not depend on its batch, its row, its replica or the kind of device, and a request that is
moved or replayed continues as it would have. A seed becomes two words on the host; from there on it is 32-bit integer
arithmetic (multiply, add, xor, shift), which is equal on all devices and cheap in kernels. Knows no logits.
"""

from __future__ import annotations

import torch

_MASK_64 = (1 << 64) - 1
# 32-bit multipliers, written as the signed numbers that int32 tensors hold. The first is 2^32 over the golden ratio.
STRIDE = 0x9E3779B1 - (1 << 32)
MIX_1 = 0x85EBCA6B - (1 << 32)
MIX_2 = 0xC2B2AE35 - (1 << 32)


def seed_words(seed: int) -> tuple[int, int]:
    """Two numbers in the range of int32, each of which depends on all of an integer of any size, modulo 2^64."""
    mixed = _mix_64(seed & _MASK_64)
    return _signed(mixed & 0xFFFFFFFF), _signed(mixed >> 32)


def noise_keys(seed_S2: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """Keys of draws, [S, 2] int32: two numbers for each output position of a seed, different for all positions.

    seed_S2: int32 of `seed_words`; position_S: int32.
    """
    low_S = _mix_32(position_S * STRIDE + seed_S2[:, 0])
    return torch.stack((low_S, _mix_32(low_S + seed_S2[:, 1])), dim=1)


def exponential_noise(key_S2: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Independent exponential variables of rate 1 for each key and token id, [S, K] float32, each >= 2^-32.

    key_S2: [S, 2] of `noise_keys`, on the device of token_ids: [K], or [S, K], int32. An element depends on its key and
    token id only. The low end, which decides who wins, keeps float32's full relative precision.
    """
    x = token_ids * STRIDE + key_S2[:, :1]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= MIX_1
    x ^= key_S2[:, 1:]
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    uniform = x.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-(2.0**-31))
    return uniform.log1p_().neg_()


def _mix_32(x: torch.Tensor) -> torch.Tensor:
    """A bijection on 32-bit integers whose output bits each depend on all input bits. Overwrites `x`."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= MIX_1
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _mix_64(value: int) -> int:
    """The same for 64-bit integers (the splitmix64 finalizer)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
