"""What hardware is found, on a machine without GPUs."""

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.platform.detect import Platform, detect_platform
from atom_cluster.platform.device import select_device


def test_cpus_are_always_there() -> None:
    platform = detect_platform("cpu")
    assert (platform.vendor, platform.device_type, platform.num_devices) == ("cpu", "cpu", 1)
    assert platform.arch
    assert select_device(platform, 3) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_gpus_auto_means_cpus_and_cuda_is_refused() -> None:
    assert detect_platform("auto") == detect_platform("cpu")
    with pytest.raises(ConfigError, match="cuda"):
        detect_platform("cuda")


def test_rocm_devices_are_called_cuda_and_counted() -> None:
    platform = Platform(vendor="rocm", arch="gfx942", num_devices=2)
    assert platform.device_type == "cuda"
    with pytest.raises(ConfigError, match="device 2"):
        select_device(platform, 2)
