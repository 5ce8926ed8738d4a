"""Random numbers as a pure function of (seed, output position, token id), computed on any device without generators.

So a request's tokens do not depend on its batch, its row, its replica or the kind of device, and a request that is
moved or replayed continues as it would have. Knows no logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_MASK_64 = (1 << 64) - 1
# 32-bit multipliers, written as the signed numbers that int32 tensors hold. The first is 2^32 over the golden ratio.
_TOKEN_STRIDE = 0x9E3779B1 - (1 << 32)
_MIX_1 = 0x85EBCA6B - (1 << 32)
_MIX_2 = 0xC2B2AE35 - (1 << 32)


def noise_keys(seeds: Sequence[int], positions: npt.NDArray[np.int64]) -> torch.Tensor:
    """Keys of draws, [R, J, 2] int32 in host memory: two independent numbers for each of a seed's positions.

    seeds: R integers of any size; positions: [R, J], each >= 0.
    """
    seed_R = np.array([seed & _MASK_64 for seed in seeds], dtype=np.uint64)
    mixed_RJ = _mix_64(_mix_64(seed_R)[:, None] + positions.astype(np.uint64))
    halves = np.stack((mixed_RJ & np.uint64(0xFFFFFFFF), mixed_RJ >> np.uint64(32)), axis=-1)
    return torch.from_numpy(halves.astype(np.uint32).view(np.int32))


def exponential_noise(key_R2: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Independent exponential variables of rate 1 for each key and token id, [R, K] float32, each >= 2^-32.

    key_R2: [R, 2] of `noise_keys`, on the device of token_ids: [K], or [R, K], int32. An element depends on its key and
    token id only. Ids are hashed with 32-bit integer arithmetic (multiply, xor, shift), which is equal on all devices;
    the low end, which decides who wins, keeps float32's full relative precision.
    """
    x = token_ids * _TOKEN_STRIDE + key_R2[:, :1]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _MIX_1
    x ^= key_R2[:, 1:]
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    uniform = x.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-(2.0**-31))
    return uniform.log1p_().neg_()


def _mix_64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection on 64-bit integers whose output bits each depend on all input bits (the splitmix64 finalizer)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)  # arithmetic of arrays wraps
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
