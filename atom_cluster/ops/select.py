"""Chooses the backend of every op once, from configuration and platform, and says why. No silent fallback.

Backends come in an order of preference: on ROCm AITER, our kernels, torch; on CUDA our kernels, torch; on CPUs cpu.
Each family of ops is of the first that has it; single ones can be configured otherwise.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch

from atom_cluster.config.ops import OpBackend, OpFamily, OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.ops.families import FIELDS
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import Platform


def select_ops(config: OpsConfig, platform: Platform, dtype: torch.dtype) -> OpTable:
    """The op table for activations of `dtype` on `platform`; `choices` of the result gives the reasons.

    Raises ConfigError when a configured backend cannot run there.
    """
    if config.backend != "auto":
        _check_platform("ops.backend", config.backend, platform)
    table = _table(config, platform, dtype)
    for family, backend in config.overrides.items():
        table = _override(table, family, backend, platform, dtype)
    return table


def _table(config: OpsConfig, platform: Platform, dtype: torch.dtype) -> OpTable:
    """Without overrides."""
    if config.backend == "torch":
        return torch_table("configured")
    if platform.vendor == "cpu" and config.backend != "triton":
        return _cpu_table(platform, dtype, "configured" if config.backend == "cpu" else "fastest on CPUs")
    if dtype == torch.float64:
        reason = f"{platform.vendor}: kernels do not compute in float64"
        return replace(torch_table(reason), float8_dtype=float8_dtype_of(platform))
    is_ours = config.backend == "triton"
    table = _triton_table(platform, "configured" if is_ours else f"fastest on {platform.vendor}")
    without = {f"ops.{family}": "torch (no kernel)" for family in FIELDS if _backend_of(table, family) == "torch"}
    table = replace(table, choices={**table.choices, **without})
    return table if is_ours or platform.vendor != "rocm" else _before(table, platform, dtype, config)


def _before(behind: OpTable, platform: Platform, dtype: torch.dtype, config: OpsConfig) -> OpTable:
    """AITER's ops, as far as the installed version has them, before those of another table.

    Raises ConfigError if AITER was asked for and cannot be used at all.
    """
    from atom_cluster.ops import aiter

    is_configured = config.backend == "aiter"
    version = aiter.aiter_version()
    reason = "aiter is not installed" if version is None else aiter.why_not_at_all(dtype)
    if reason is not None:
        if is_configured:
            raise ConfigError(f"ops.backend is aiter: {reason}")
        return replace(behind, choices={**behind.choices, "ops": f"{behind.choices['ops']}; {reason}"})
    choices = {"ops": f"aiter {version} ({'configured' if is_configured else 'fastest on rocm'}; {platform.arch})"}
    ops: dict[str, Any] = {}
    for family in FIELDS:
        if family not in aiter.FAMILIES:
            choices[f"ops.{family}"] = f"{_backend_of(behind, family)} (aiter has none that fits)"
        elif (missing := aiter.why_not(aiter.FAMILIES[family].functions)) is not None:
            choices[f"ops.{family}"] = f"{_backend_of(behind, family)} ({missing})"
        else:
            found, note = _aiter_family(family, behind, platform)
            ops.update(found)
            choices[f"ops.{family}"] = f"aiter ({note})"
    return replace(behind, **ops, choices=choices)


def _aiter_family(family: OpFamily, behind: OpTable, platform: Platform) -> tuple[dict[str, Any], str]:
    """Ops of a family that AITER has, and what is to be said about them."""
    from atom_cluster.ops import aiter

    chosen = aiter.FAMILIES[family]
    note = f"{_backend_of(behind, family)} for what it has no kernel for"
    has_float4 = platform.arch.startswith("gfx95")
    if has_float4 and (reason := aiter.why_not(chosen.float4_functions)) is not None:
        has_float4, note = False, f"{note}, and for four bits: {reason}"
    return dict(chosen.ops(behind, has_float4)), note


def _override(table: OpTable, family: OpFamily, backend: OpBackend, platform: Platform, dtype: torch.dtype) -> OpTable:
    """The table with one family of another backend."""
    key = f"ops.overrides.{family}"
    _check_platform(key, backend, platform)
    if backend not in ("torch", "cpu") and dtype == torch.float64:
        raise ConfigError(f"{key} is {backend}, whose kernels do not compute in float64")
    if backend == "aiter":
        from atom_cluster.ops import aiter

        if family not in aiter.FAMILIES:
            raise ConfigError(f"{key} is aiter, which has no such ops for us")
        reason = aiter.why_not_at_all(dtype) or aiter.why_not(aiter.FAMILIES[family].functions)
        if reason is not None:
            raise ConfigError(f"{key} is aiter: {reason}")
        ops, note = _aiter_family(family, _triton_table(platform, "behind aiter"), platform)
        choice = f"aiter (configured; {note})"
    else:
        source = {
            "torch": lambda: torch_table("configured"),
            "cpu": lambda: _cpu_table(platform, dtype, "configured"),
            "triton": lambda: _triton_table(platform, "configured"),
        }[backend]()
        if backend != "torch" and _backend_of(source, family) == "torch":
            raise ConfigError(f"{key} is {backend}, which has no such ops; torch has")
        ops, choice = {field: getattr(source, field) for field in FIELDS[family]}, f"{backend} (configured)"
    return replace(table, **ops, choices={**table.choices, f"ops.{family}": choice})


def _check_platform(key: str, backend: OpBackend, platform: Platform) -> None:
    if backend == "cpu" and platform.vendor != "cpu":
        raise ConfigError(f"{key} is cpu, but this rank computes on {platform.vendor} ({platform.arch})")
    if backend == "triton" and platform.vendor == "cpu" and not _is_interpreted():
        raise ConfigError(f"{key} is triton, but this rank computes on CPUs, where kernels can only be interpreted")
    if backend == "aiter" and platform.vendor != "rocm":
        raise ConfigError(f"{key} is aiter, which is for ROCm; this rank computes on {platform.vendor}")


def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPUs too."""
    if importlib.util.find_spec("triton") is None:
        return False
    from atom_cluster.ops.triton.runtime import INTERPRETED

    return INTERPRETED


def _backend_of(table: OpTable, family: OpFamily) -> str:
    """torch, if the table has the reference ops of a family, else the backend that the table is of."""
    reference = torch_table("reference")
    is_reference = all(getattr(table, field) is getattr(reference, field) for field in FIELDS[family])
    return "torch" if is_reference else table.choices["ops"].split()[0]


def float8_dtype_of(platform: Platform) -> torch.dtype:
    """The e4m3 kind that the platform's matrix units take: MI300 (gfx94x) has the one without a minus zero."""
    return torch.float8_e4m3fnuz if platform.arch.startswith("gfx94") else torch.float8_e4m3fn


def torch_table(reason: str) -> OpTable:
    """The reference ops, on any device and in any float dtype."""
    from atom_cluster.ops import torch_ref as ref

    return OpTable(
        place_tokens=ref.place_tokens,
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
        sigmoid_and_mul=ref.sigmoid_and_mul,
        look_up=ref.look_up,
        plan_attention=ref.plan_attention,
        prepare_latent_weights=ref.prepare_latent_weights,
        plan_mla=ref.plan_mla,
        plan_index=ref.plan_index,
        plan_compression=ref.plan_compression,
        plan_compressed_attention=ref.plan_compressed_attention,
        connect_streams=ref.connect_streams,
        write_streams=ref.write_streams,
        join_streams=ref.join_streams,
        plan_gated_delta=ref.plan_gated_delta,
        gated_rms_norm=ref.gated_rms_norm,
        adjust=ref.adjust,
        mask=ref.mask,
        sample=ref.sample,
        race=ref.race,
        accept=ref.accept,
        choices={"ops": f"torch ({reason})"},
    )


def _triton_table(platform: Platform, reason: str) -> OpTable:
    """Our kernels, and reference ops for what has none."""
    from atom_cluster.ops import triton as kernels

    kernels.watch_compilations()
    return replace(
        torch_table(reason),
        place_tokens=kernels.place_tokens,
        prepare_linear=kernels.prepare_linear,
        prepare_quantized_linear=kernels.prepare_quantized_linear,
        prepare_experts=kernels.prepare_experts,
        prepare_quantized_experts=kernels.prepare_quantized_experts,
        route=kernels.route,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        silu_and_mul=kernels.silu_and_mul,
        gelu_tanh_and_mul=kernels.gelu_tanh_and_mul,
        sigmoid_and_mul=kernels.sigmoid_and_mul,
        look_up=kernels.look_up,
        plan_attention=kernels.plan_attention,
        prepare_latent_weights=kernels.prepare_latent_weights,
        plan_mla=kernels.plan_mla,
        plan_index=kernels.plan_index,
        plan_compression=kernels.plan_compression,
        plan_compressed_attention=kernels.plan_compressed_attention,
        plan_gated_delta=kernels.plan_gated_delta,
        rotary=kernels.rotary,
        gated_rms_norm=kernels.gated_rms_norm,
        connect_streams=kernels.connect_streams,
        write_streams=kernels.write_streams,
        join_streams=kernels.join_streams,
        adjust=kernels.adjust,
        mask=kernels.mask,
        sample=kernels.sample,
        race=kernels.race,
        accept=kernels.accept,
        float8_dtype=float8_dtype_of(platform),
        is_capturable=True,
        take_compiled=kernels.take_compiled,
        compile_ahead=kernels.compiling_ahead if kernels.can_compile_ahead() else None,
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
        place_tokens=ref.place_tokens,
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
        sigmoid_and_mul=ref.sigmoid_and_mul,
        look_up=ref.look_up,
        plan_attention=cpu.attention_planner(dtype),
        prepare_latent_weights=ref.prepare_latent_weights,
        plan_mla=cpu.mla_planner(dtype),
        plan_index=ref.plan_index,
        plan_compression=ref.plan_compression,
        plan_compressed_attention=ref.plan_compressed_attention,
        connect_streams=ref.connect_streams,
        write_streams=ref.write_streams,
        join_streams=ref.join_streams,
        plan_gated_delta=cpu.plan_gated_delta,
        gated_rms_norm=cpu.gated_rms_norm,
        adjust=cpu.adjust,
        mask=ref.mask,
        sample=cpu.sample,
        race=ref.race,
        accept=ref.accept,
        choices={"ops": f"cpu ({reason}; {platform.arch})", "ops.linear": linear},
    )
