"""Quantization of a float checkpoint while it is loaded."""

from __future__ import annotations

from typing import Literal

from atom_cluster.config.base import FrozenConfig

OnlineFormat = Literal["fp8", "fp8_block", "mxfp8", "mxfp4", "int8", "int4"]


class QuantizationConfig(FrozenConfig):
    """How linear layers of a float checkpoint are stored. Quantized checkpoints are recognised by themselves."""

    online: OnlineFormat | None = None
    """Format to convert to. fp8: a scale per output, inputs in FP8 per token. fp8_block: scales of 128x128 blocks,
    inputs in FP8 per 128. mxfp8: 32 inputs share a power of two, of weights and of inputs. int8: as fp8. mxfp4, int4:
    weights only, in groups of 32. The head, embeddings and routers stay as they are."""
    exclude: tuple[str, ...] = ()
    """Layers to leave as they are, by name: `model.layers.0`, `mlp.down_proj`, `model.layers.*.self_attn`."""
