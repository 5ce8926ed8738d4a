"""Chooses the op backend once, from configuration and platform, and says why. No silent fallback."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import Platform


def select_ops(config: OpsConfig, platform: Platform, dtype: torch.dtype) -> OpTable:
    """The op table for activations of `dtype` on `platform`; `choices` of the result gives the reasons.

    Raises ConfigError when the configured backend cannot run there.
    """
    if config.backend == "cpu" and platform.vendor != "cpu":
        raise ConfigError(f"ops.backend is cpu, but this rank computes on {platform.vendor} ({platform.arch})")
    if config.backend == "triton" and platform.vendor == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "ops.backend is triton, but this rank computes on CPUs, where kernels can only be interpreted"
        )
    if config.backend == "torch":
        return torch_table("configured")
    if platform.vendor == "cpu" and config.backend != "triton":
        return _cpu_table(platform, dtype, "configured" if config.backend == "cpu" else "fastest on CPUs")
    if dtype == torch.float64:
        reason = f"{platform.vendor}: kernels do not compute in float64"
        return replace(torch_table(reason), float8_dtype=float8_dtype_of(platform))
    return _triton_table(platform, "configured" if config.backend == "triton" else f"fastest on {platform.vendor}")


def float8_dtype_of(platform: Platform) -> torch.dtype:
    """The e4m3 kind that the platform's matrix units take: MI300 (gfx94x) has the one without a minus zero."""
    return torch.float8_e4m3fnuz if platform.arch.startswith("gfx94") else torch.float8_e4m3fn


def torch_table(reason: str) -> OpTable:
    """The reference ops, on any device and in any float dtype."""
    from atom_cluster.ops import torch_ref as ref

    return OpTable(
        prepare_linear=ref.prepare_linear,
        prepare_experts=ref.prepare_experts,
        prepare_quantized_linear=ref.prepare_quantized_linear,
        prepare_quantized_experts=ref.prepare_quantized_experts,
        route=ref.route,
        rms_norm=ref.rms_norm,
        add_rms_norm=ref.add_rms_norm,
        rotary=ref.rotary,
        silu_and_mul=ref.silu_and_mul,
        gelu_tanh_and_mul=ref.gelu_tanh_and_mul,
        plan_attention=ref.plan_attention,
        prepare_latent_weights=ref.prepare_latent_weights,
        plan_mla=ref.plan_mla,
        plan_index=ref.plan_index,
        plan_compression=ref.plan_compression,
        plan_compressed_attention=ref.plan_compressed_attention,
        connect_streams=ref.connect_streams,
        join_streams=ref.join_streams,
        plan_gated_delta=ref.plan_gated_delta,
        gated_rms_norm=ref.gated_rms_norm,
        choices={"ops": f"torch ({reason})"},
    )


def _triton_table(platform: Platform, reason: str) -> OpTable:
    """Our kernels, and reference ops for what has none."""
    from atom_cluster.ops import triton as kernels

    return replace(
        torch_table(reason),
        silu_and_mul=kernels.silu_and_mul,
        float8_dtype=float8_dtype_of(platform),
        choices={"ops": f"triton ({reason}; {platform.arch})"},
    )


def _cpu_table(platform: Platform, dtype: torch.dtype, reason: str) -> OpTable:
    from atom_cluster.ops import cpu
    from atom_cluster.ops import torch_ref as ref

    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        linear = f"{name} weights; packing needs float32 activations"
    elif not cpu.can_pack():
        linear = f"float32 weights; this build of torch ({torch.__version__}) has no FBGEMM"
    else:
        linear = "packed float16 weights where half precision holds them, else float32"
    return OpTable(
        prepare_linear=cpu.prepare_linear,
        prepare_experts=cpu.prepare_experts,
        prepare_quantized_linear=ref.prepare_quantized_linear,
        prepare_quantized_experts=ref.prepare_quantized_experts,
        route=ref.route,
        rms_norm=cpu.rms_norm,
        add_rms_norm=cpu.add_rms_norm,
        rotary=cpu.rotary,
        silu_and_mul=cpu.silu_and_mul,
        gelu_tanh_and_mul=ref.gelu_tanh_and_mul,
        plan_attention=cpu.attention_planner(dtype),
        prepare_latent_weights=ref.prepare_latent_weights,
        plan_mla=cpu.mla_planner(dtype),
        plan_index=ref.plan_index,
        plan_compression=ref.plan_compression,
        plan_compressed_attention=ref.plan_compressed_attention,
        connect_streams=ref.connect_streams,
        join_streams=ref.join_streams,
        plan_gated_delta=cpu.plan_gated_delta,
        gated_rms_norm=cpu.gated_rms_norm,
        choices={"ops": f"cpu ({reason}; {platform.arch})", "ops.linear": linear},
    )
