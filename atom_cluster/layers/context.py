"""LayerContext: everything a layer may ask about its surroundings, given at construction. There is no other context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.quantization.scheme import LinearScheme, QuantizationPlan
from atom_cluster.quantization.unquantized import NOTHING_QUANTIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """What layers are built with. The caller keeps ownership of `groups` and closes them after the model."""

    ops: OpTable
    groups: ProcessGroups
    dtype: torch.dtype
    """Dtype of activations."""
    device: torch.device
    name: str = ""
    """Name of the layer's tensors in the checkpoint, up to the last dot: `model.layers.0.self_attn`."""
    quantization: QuantizationPlan = NOTHING_QUANTIZED
    """How linear layers store their weights, by name."""
    weight_dtype: torch.dtype | None = None
    """Dtype of unquantized weights that no checkpoint has; None: `dtype`."""
    kv_dtype: str | None = None
    """Dtype of keys and values in the cache, as `kv_cache.layout` spells it; None: `dtype`."""
    stored_dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    """Dtype of each tensor of the checkpoint, None for what is no plain float. For weights that stay as narrow as they
    are stored, and for layers that come in several forms (stacked experts, say). Empty without a checkpoint."""

    def at(self, name: str) -> LayerContext:
        """The same for a part with this name."""
        return replace(self, name=self.full_name(name))

    def full_name(self, name: str) -> str:
        """Name in the checkpoint of a part with this name; the layer's own for an empty one."""
        return f"{self.name}.{name}" if self.name and name else self.name or name

    @property
    def unquantized(self) -> LayerContext:
        """The same for a part that every checkpoint stores as plain floats."""
        return replace(self, quantization=NOTHING_QUANTIZED)

    def scheme(self, names: Sequence[str]) -> LinearScheme:
        """How these projections, which are to be fused, are stored. Raises ConfigError when they differ."""
        schemes = {name: self.quantization.linear(self.full_name(name)) for name in names}
        if len({scheme.name for scheme in schemes.values()}) > 1:
            described = ", ".join(f"{self.full_name(name)} is {scheme.name}" for name, scheme in schemes.items())
            raise ConfigError(f"projections that are computed together are quantized differently: {described}")
        return next(iter(schemes.values()))

    def storage_dtype(self, names: Sequence[str]) -> torch.dtype:
        """Dtype to allocate unquantized tensors of these names in, which are held together.

        The narrowest that loses nothing: that of the checkpoint, if it is one and `dtype` can hold all its values. So
        a bfloat16 checkpoint computed in float32 stays small, as far as `ops.prepare_linear` leaves it so.
        """
        dtypes = {self.stored_dtypes.get(self.full_name(name), self.weight_dtype) for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        return dtype if dtype is not None and torch.promote_types(dtype, self.dtype) == self.dtype else self.dtype

    @property
    def cache_dtype(self) -> str:
        """Dtype of keys and values, as `kv_cache.layout` spells it."""
        return self.kv_dtype or str(self.dtype).removeprefix("torch.")
