"""Which implementation each op uses."""

from __future__ import annotations

from typing import Literal

from atom_cluster.config.base import FrozenConfig

OpBackend = Literal["torch", "cpu", "triton", "aiter"]
OpBackendChoice = Literal["auto", "torch", "cpu", "triton", "aiter"]
OpFamily = Literal[
    "activation",
    "attention",
    "compressed_attention",
    "embedding",
    "experts",
    "gated_delta",
    "linear",
    "mla",
    "norm",
    "quantized_experts",
    "quantized_linear",
    "rotary",
    "routing",
    "sampling",
    "sparse_index",
    "step_inputs",
    "streams",
]
"""Ops that are chosen together, as one prepares or stores what another reads."""


class OpsConfig(FrozenConfig):
    """Op backends. auto picks the fastest that the platform has, and says which and why."""

    backend: OpBackendChoice = "auto"
    """torch: reference implementations, any device. cpu: packed half-precision weights with float32 arithmetic. triton:
    our kernels, on GPUs. aiter: AMD's kernels, on ROCm, and ours for what they do not do."""
    overrides: dict[OpFamily, OpBackend] = {}
    """Other backends for single families of ops: {"attention": "triton"}. One that has no such ops here is an error.
    Families: activation, attention, compressed_attention, embedding, experts, gated_delta, linear, mla, norm,
    quantized_experts, quantized_linear, rotary, routing, sampling, sparse_index, step_inputs, streams."""
