"""Quantizes the weights of a float checkpoint once they are loaded. Knows no layers.

A layer's weights are loaded as floats into host memory, and only its quantized form is put on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atom_cluster.config.quantization import OnlineFormat, QuantizationConfig
from atom_cluster.errors import ConfigError
from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.quantization.names import is_listed
from atom_cluster.quantization.quantize import QUANTIZERS, stack_experts
from atom_cluster.quantization.quantized import QuantizedScheme
from atom_cluster.quantization.scheme import LinearScheme, LinearShape, QuantizationPlan, StoredTensor
from atom_cluster.quantization.unquantized import NOTHING_QUANTIZED, UNQUANTIZED

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Online(QuantizedScheme):
    """One tensor `weight` per projection, in a float dtype, until `prepare`."""

    format: OnlineFormat
    device: torch.device
    """Where the quantized weight goes."""

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        return f"{self.format} online"

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """The weight, on the host; of a model that is only planned, nowhere."""
        return UNQUANTIZED.create_tensors(shape, dtype=dtype, device=device if device.type == "meta" else _HOST)

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Quantized, expert by expert."""
        quantize = QUANTIZERS[self.format]
        weight = tensors["weight"]
        if shape.num_experts is None:
            return quantize(weight.to(self.device).float())
        return stack_experts([quantize(of_expert.to(self.device).float()) for of_expert in weight])

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], *, shape: LinearShape, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight as it was loaded: nothing is gained by rounding what is kept in full."""
        return tensors["weight"].to(device=self.device, dtype=dtype)


class OnlinePlan:
    """One format for all linear layers that are not excluded."""

    ignored: tuple[str, ...] = ()

    def __init__(self, config: QuantizationConfig, device: torch.device) -> None:
        if config.online is None:
            raise AssertionError("no format")
        self._scheme = Online(config.online, device)
        self._excluded = config.exclude

    def linear(self, name: str) -> LinearScheme:
        """Plain floats if excluded."""
        return UNQUANTIZED if is_listed(name, self._excluded) else self._scheme


def with_online(plan: QuantizationPlan, config: QuantizationConfig, device: torch.device) -> QuantizationPlan:
    """`plan`, or what `config` asks for instead. Raises ConfigError when the checkpoint is quantized already."""
    if config.online is None:
        return plan
    if plan is not NOTHING_QUANTIZED:
        raise ConfigError(f"quantization.online is {config.online}, and the checkpoint is quantized already")
    return OnlinePlan(config, device)
