"""Which ops of the table are chosen together. Knows no backends."""

from __future__ import annotations

from collections.abc import Mapping

from atom_cluster.config.ops import OpFamily

FIELDS: Mapping[OpFamily, tuple[str, ...]] = {
    "activation": ("silu_and_mul", "gelu_tanh_and_mul", "sigmoid_and_mul"),
    "attention": ("plan_attention",),
    "compressed_attention": ("plan_compression", "plan_compressed_attention"),
    "embedding": ("look_up",),
    "experts": ("prepare_experts",),
    "gated_delta": ("plan_gated_delta", "gated_rms_norm"),
    "linear": ("prepare_linear",),
    "mla": ("prepare_latent_weights", "plan_mla"),
    "norm": ("rms_norm", "add_rms_norm"),
    "quantized_experts": ("prepare_quantized_experts",),
    "quantized_linear": ("prepare_quantized_linear",),
    "rotary": ("rotary",),
    "routing": ("route",),
    "sampling": ("adjust", "mask", "sample", "race", "accept"),
    "sparse_index": ("plan_index",),
    "step_inputs": ("place_tokens",),
    "streams": ("connect_streams", "write_streams", "join_streams"),
}
"""Every op of `OpTable` is in one of them."""
