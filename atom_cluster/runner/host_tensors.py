"""Small host values as tensors on the device, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Number = TypeVar("Number", int, float)


def on_device(
    values: Sequence[Number] | Sequence[Sequence[Number]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of `values`. On GPUs the copy is queued behind the work already issued there."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; from pinned memory, because only such copies do not wait."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
