"""Random numbers as a pure function of (seed, output position, token id), computed on any device without generators.

So a request's tokens do not depend on its batch, its row, its replica or the kind of device, and a request that is
moved or replayed continues as it would have. Knows no logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.runner.host_tensors import on_device

NoiseKey = tuple[int, int]
"""Two independent signed 32-bit numbers."""

_MASK_64 = (1 << 64) - 1
# 32-bit multipliers, written as the signed numbers that int32 tensors hold. The first is 2^32 over the golden ratio.
_TOKEN_STRIDE = 0x9E3779B1 - (1 << 32)
_MIX_1 = 0x85EBCA6B - (1 << 32)
_MIX_2 = 0xC2B2AE35 - (1 << 32)


def noise_key(seed: int, position: int) -> NoiseKey:
    """Key of one draw, for any integer seed and any position >= 0."""
    mixed = _mix_64(_mix_64(seed & _MASK_64) + position)
    return _signed_32(mixed & 0xFFFFFFFF), _signed_32(mixed >> 32)


def exponential_noise(keys: Sequence[NoiseKey], token_ids: torch.Tensor) -> torch.Tensor:
    """Independent exponential variables of rate 1 for each key and token id, [len(keys), K] float32, each >= 2^-32.

    token_ids: [K], or [len(keys), K], int32. An element depends on its key and token id only. Ids are hashed with
    32-bit integer arithmetic (multiply, xor, shift), which is equal on all devices; the low end, which decides who
    wins, keeps float32's full relative precision.
    """
    key_R2 = on_device(keys, torch.int32, token_ids.device)
    x = token_ids * _TOKEN_STRIDE + key_R2[:, :1]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _MIX_1
    x ^= key_R2[:, 1:]
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    uniform = x.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-(2.0**-31))
    return uniform.log1p_().neg_()


def _mix_64(value: int) -> int:
    """A bijection on 64-bit integers whose output bits each depend on all input bits (the splitmix64 finalizer)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _signed_32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
