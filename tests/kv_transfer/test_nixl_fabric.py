from __future__ import annotations

import os
from pathlib import Path

import pytest

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.nixl_fabric import find_fabric, has_rdma, prepare_ucx
from atom_cluster.kv_transfer.shared_memory import name_in_realm

UCX_VARIABLES = ("UCX_TLS", "UCX_PROTO_EMULATION_ENABLE", "UCX_MODULES", "UCX_LOG_LEVEL")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UCX_VARIABLES:
        # Set first, so that what a test leaves behind is removed.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def make_system(root: Path, *, ports: tuple[str, ...] = (), has_verbs: bool = True) -> Path:
    """A root directory with a device per state of its port."""
    for number, state in enumerate(ports):
        port = root / f"sys/class/infiniband/mlx5_{number}/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    (root / "dev/infiniband").mkdir(parents=True)
    if has_verbs:
        (root / "dev/infiniband/uverbs0").touch()
    return root


@pytest.mark.parametrize(
    ("ports", "has_verbs", "expected"),
    [
        ((), True, False),
        (("1: DOWN",), True, False),
        (("1: DOWN", "4: ACTIVE"), True, True),
        (("4: ACTIVE",), False, False),
    ],
    ids=["no device", "down", "one is active", "not ours to use"],
)
def test_rdma_needs_an_active_port_and_a_device_file(
    tmp_path: Path, ports: tuple[str, ...], has_verbs: bool, expected: bool
) -> None:
    assert has_rdma(system=make_system(tmp_path, ports=ports, has_verbs=has_verbs)) is expected


def test_with_rdma_no_sockets_are_opened(tmp_path: Path) -> None:
    fabric = find_fabric(system=make_system(tmp_path, ports=("4: ACTIVE",)))
    assert fabric.transport_name == "nixl@rdma"
    assert "TLS=^tcp" in fabric.engine_config


def test_without_rdma_only_processes_of_one_host_have_it_in_common_through_loopback(tmp_path: Path) -> None:
    fabric = find_fabric(system=make_system(tmp_path))
    assert fabric.transport_name == name_in_realm("nixl")
    assert "NET_DEVICES=lo" in fabric.engine_config


@pytest.mark.parametrize("ports", [(), ("4: ACTIVE",)], ids=["no device", "rdma"])
def test_reads_are_never_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ports: tuple[str, ...]) -> None:
    system = make_system(tmp_path, ports=ports)
    assert "PROTO_EMULATION_ENABLE=n" in find_fabric(system=system).engine_config
    monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")
    with pytest.raises(TransferError, match="UCX_PROTO_EMULATION_ENABLE"):
        find_fabric(system=system)


def test_ucx_is_told_what_it_takes_as_variables_only_unless_the_operator_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_LOG_LEVEL", "debug")
    prepare_ucx(system=make_system(tmp_path))
    assert {name: os.environ.get(name) for name in UCX_VARIABLES} == {
        "UCX_TLS": None,
        "UCX_PROTO_EMULATION_ENABLE": None,
        "UCX_MODULES": "^ib",
        "UCX_LOG_LEVEL": "debug",
    }


def test_libraries_for_rdma_devices_are_loaded_where_there_is_one(tmp_path: Path) -> None:
    prepare_ucx(system=make_system(tmp_path, ports=("4: ACTIVE",)))
    assert "UCX_MODULES" not in os.environ
