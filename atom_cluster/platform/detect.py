"""What hardware this process sees: CPUs, CUDA or ROCm devices. Knows no models and takes no decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """The hardware that one rank computes on."""

    vendor: Literal["cpu", "cuda", "rocm"]
    arch: str
    """CPU capability as torch names it (`AVX512`), `sm_90` style for CUDA, `gfx942` style for ROCm."""
    num_devices: int
    """Devices visible to this process; 1 for CPUs."""

    @property
    def device_type(self) -> str:
        """Type part of a torch device; ROCm devices are called cuda there."""
        return "cpu" if self.vendor == "cpu" else "cuda"


def detect_platform(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """The platform for a configured device. auto: GPUs if torch sees any, else CPUs.

    Raises ConfigError when `device` is cuda and torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device is cuda, but torch sees no CUDA or ROCm device in this process")
    if device == "cpu" or not has_gpu:
        return Platform(vendor="cpu", arch=torch.backends.cpu.get_cpu_capability(), num_devices=1)
    if torch.version.hip is not None:
        arch = str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
        return Platform(vendor="rocm", arch=arch, num_devices=torch.cuda.device_count())
    major, minor = torch.cuda.get_device_capability(0)
    return Platform(vendor="cuda", arch=f"sm_{major}{minor}", num_devices=torch.cuda.device_count())
