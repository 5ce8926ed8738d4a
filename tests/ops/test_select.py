"""Which backend is chosen, and what is said about it."""

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError
from atom_cluster.ops import cpu, torch_ref
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import Platform

CPU = Platform(vendor="cpu", arch="AVX2", num_devices=1)
ROCM = Platform(vendor="rocm", arch="gfx942", num_devices=8)


def test_auto_takes_the_cpu_backend_on_cpus_and_torch_elsewhere() -> None:
    on_cpu = select_ops(OpsConfig(), CPU, torch.float32)
    assert on_cpu.prepare_linear is cpu.prepare_linear
    assert "cpu" in on_cpu.choices["ops"]
    on_gpu = select_ops(OpsConfig(), ROCM, torch.bfloat16)
    assert on_gpu.prepare_linear is torch_ref.prepare_linear
    assert "rocm" in on_gpu.choices["ops"]


def test_a_configured_backend_is_taken_or_refused() -> None:
    assert select_ops(OpsConfig(backend="torch"), CPU, torch.float32).rms_norm is torch_ref.rms_norm
    with pytest.raises(ConfigError, match=r"ops\.backend.*rocm"):
        select_ops(OpsConfig(backend="cpu"), ROCM, torch.bfloat16)


def test_weights_that_will_not_be_packed_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bfloat16" in select_ops(OpsConfig(), CPU, torch.bfloat16).choices["ops.linear"]
    monkeypatch.setattr(cpu, "can_pack", lambda: False)
    assert "FBGEMM" in select_ops(OpsConfig(), CPU, torch.float32).choices["ops.linear"]
