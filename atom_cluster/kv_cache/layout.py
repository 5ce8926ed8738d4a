"""KvLayout: how many bytes a KV block takes and what two engines must agree on to exchange blocks. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayerLayout:
    """KV of one layer on one rank."""

    num_kv_heads: int
    """Heads on this rank."""
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        """Numbers stored per token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """KV of all layers on one rank."""

    layers: tuple[KvLayerLayout, ...]
    dtype: str
    """A key of `DTYPE_BYTES`."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV that one token takes on this rank."""
        return sum(layer.elements_per_token for layer in self.layers) * DTYPE_BYTES[self.dtype]

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens on this rank."""
        return self.bytes_per_token * block_size

    def describe(self) -> str:
        """A string equal exactly when two layouts are; part of an engine's fingerprint."""
        layers = ",".join(f"{layer.num_kv_heads}x{layer.key_dim}+{layer.value_dim}" for layer in self.layers)
        return f"{self.dtype}[{layers}]"
