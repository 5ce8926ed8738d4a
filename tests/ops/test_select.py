"""Which backend is chosen, and what is said about it."""

from dataclasses import fields
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from atom_cluster.config.ops import OpFamily, OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.ops import aiter, cpu, torch_ref, triton
from atom_cluster.ops.families import FIELDS
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import Platform
from tests.ops.aiter import stand_in

CPU = Platform(vendor="cpu", arch="AVX2", num_devices=1)
ROCM = Platform(vendor="rocm", arch="gfx942", num_devices=8)
CUDA = Platform(vendor="cuda", arch="sm_90", num_devices=1)
HALF = torch.bfloat16


def test_auto_takes_the_cpu_backend_on_cpus_and_torch_elsewhere() -> None:
    on_cpu = select_ops(OpsConfig(), CPU, torch.float32)
    assert on_cpu.prepare_linear is cpu.prepare_linear
    assert "cpu" in on_cpu.choices["ops"]
    on_gpu = select_ops(OpsConfig(), ROCM, torch.bfloat16)
    assert on_gpu.prepare_linear is triton.prepare_linear
    assert "rocm" in on_gpu.choices["ops"]


def test_a_configured_backend_is_taken_or_refused() -> None:
    assert select_ops(OpsConfig(backend="torch"), CPU, torch.float32).rms_norm is torch_ref.rms_norm
    with pytest.raises(ConfigError, match=r"ops\.backend.*rocm"):
        select_ops(OpsConfig(backend="cpu"), ROCM, torch.bfloat16)


def test_weights_that_will_not_be_packed_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bfloat16" in select_ops(OpsConfig(), CPU, torch.bfloat16).choices["ops.linear"]
    monkeypatch.setattr(cpu, "can_pack", lambda: False)
    assert "FBGEMM" in select_ops(OpsConfig(), CPU, torch.float32).choices["ops.linear"]


def test_every_op_is_in_one_family() -> None:
    others = ("float8_dtype", "is_capturable", "take_compiled", "compile_ahead", "choices")
    ops = [field.name for field in fields(OpTable) if field.name not in others]
    assert sorted(ops) == sorted(name for names in FIELDS.values() for name in names)
    assert set(FIELDS) == set(get_args(OpFamily)) and set(aiter.FAMILIES) <= set(FIELDS)
    documented = OpsConfig.model_fields["overrides"].description or ""
    assert all(family in documented for family in FIELDS)


def test_families_without_a_kernel_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "rotary", torch_ref.rotary)
    choices = select_ops(OpsConfig(), CUDA, HALF).choices
    assert choices["ops.rotary"] == "torch (no kernel)" and "ops.norm" not in choices


def test_rocm_takes_aiter_where_it_has_what_we_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = select_ops(OpsConfig(), ROCM, HALF)
    assert "aiter is not installed" in ours.choices["ops"] and ours.rms_norm is triton.rms_norm
    stand_in.install(monkeypatch)
    ops = select_ops(OpsConfig(), ROCM, HALF)
    assert ops.choices["ops"].startswith("aiter") and ops.float8_dtype == torch.float8_e4m3fnuz
    for family in FIELDS:
        assert ops.choices[f"ops.{family}"].startswith("aiter (") == (family in aiter.FAMILIES), family
    assert ops.rms_norm is not triton.rms_norm and ops.look_up is triton.look_up
    assert "triton for what it has no kernel for" in ops.choices["ops.norm"]


def test_what_another_version_does_not_have_is_left_to_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, stand_in.WHEEL)
    ops = select_ops(OpsConfig(), Platform(vendor="rocm", arch="gfx950", num_devices=8), HALF)
    assert ops.plan_attention is triton.plan_attention
    assert "kv_last_page_lens" in ops.choices["ops.attention"]
    assert "aiter" in ops.choices["ops.norm"]
    assert "gemm_a4w4" in ops.choices["ops.quantized_linear"]
    assert "gemm_a4w4" not in ops.choices["ops.quantized_experts"]


def test_aiter_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in (CPU, CUDA):
        with pytest.raises(ConfigError, match="for ROCm"):
            select_ops(OpsConfig(backend="aiter"), platform, HALF)
    with pytest.raises(ConfigError, match="not installed"):
        select_ops(OpsConfig(backend="aiter"), ROCM, HALF)
    stand_in.install(monkeypatch)
    assert "configured" in select_ops(OpsConfig(backend="aiter"), ROCM, HALF).choices["ops"]
    with pytest.raises(ConfigError, match="half precision"):
        select_ops(OpsConfig(backend="aiter"), ROCM, torch.float32)
    assert "half precision" in select_ops(OpsConfig(), ROCM, torch.float32).choices["ops"]


def test_single_families_can_be_chosen_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = select_ops(OpsConfig(overrides={"norm": "torch", "linear": "torch"}), CUDA, HALF)
    assert ops.rms_norm is torch_ref.rms_norm and ops.look_up is triton.look_up
    assert ops.choices["ops.norm"] == "torch (configured)"
    stand_in.install(monkeypatch)
    ops = select_ops(OpsConfig(overrides={"attention": "triton"}), ROCM, HALF)
    assert ops.plan_attention is triton.plan_attention and "aiter" in ops.choices["ops.norm"]
    ops = select_ops(OpsConfig(backend="triton", overrides={"attention": "aiter"}), ROCM, HALF)
    assert ops.plan_attention is not triton.plan_attention and ops.rms_norm is triton.rms_norm
    assert "aiter (configured" in ops.choices["ops.attention"]


def test_overrides_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "rotary", torch_ref.rotary)
    wrong = [
        ({"norm": "aiter"}, CUDA, HALF, "for ROCm"),
        ({"norm": "cpu"}, CUDA, HALF, "computes on cuda"),
        ({"rotary": "triton"}, CUDA, HALF, "no such ops"),
        ({"rotary": "aiter"}, ROCM, HALF, "no such ops"),
        ({"norm": "aiter"}, ROCM, HALF, "cannot be imported"),
        ({"norm": "triton"}, CUDA, torch.float64, "float64"),
    ]
    for overrides, platform, dtype, message in wrong:
        with pytest.raises(ConfigError, match=message):
            select_ops(OpsConfig(overrides=overrides), platform, dtype)
    with pytest.raises(ValidationError):
        OpsConfig.model_validate({"overrides": {"norms": "triton"}})
