"""One facade over devices: which torch device a rank uses and how much memory it has. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.platform.detect import Platform


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one GPU, over all processes that use it."""

    free_bytes: int
    total_bytes: int


def select_device(platform: Platform, local_index: int = 0) -> torch.device:
    """The torch device with this index among the visible ones, made current for GPUs. CPUs ignore the index.

    Raises ConfigError when there are fewer devices.
    """
    if platform.device_type == "cpu":
        return torch.device("cpu")
    if local_index >= platform.num_devices:
        raise ConfigError(f"device {local_index} asked for, but this process sees {platform.num_devices}")
    torch.cuda.set_device(local_index)
    return torch.device("cuda", local_index)


def device_memory(device: torch.device) -> DeviceMemory:
    """Memory of a GPU as its driver reports it."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(free_bytes, total_bytes)
