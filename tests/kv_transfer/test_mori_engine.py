"""How MORI-IO is called, and what it is not let near."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import mori, mori_descriptor, mori_engine, mori_plan, mori_reader
from atom_cluster.kv_transfer.mori_descriptor import DescriptorSeal
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.registry import TransportSettings, open_transport
from atom_cluster.platform.detect import Platform
from atom_cluster.units import Deadline
from tests.kv_transfer import mori_io_stand_in as stand_in
from tests.kv_transfer.mori_io_stand_in import CRIMES, FAULTS, open_over_stand_in
from tests.kv_transfer.mori_ranks import (
    NAME,
    SETTINGS,
    Gate,
    nothing_that_crashes_mori,
    two_ranks,
)
from tests.kv_transfer.ranks import SECRET, rank_here, wait_for


@pytest.fixture(autouse=True)
def no_crimes() -> Iterator[None]:
    with nothing_that_crashes_mori():
        yield


# --- calls --------------------------------------------------------------------------------------------------------


def test_all_that_is_called_is_published() -> None:
    """The stand-in binds each call it gets to the signature; here, that no other name is used."""
    bindings = stand_in.SIGNATURES[stand_in.BINDINGS]
    names = {part for name in bindings for part in name.partition(":")[2].split(".")}
    members = {parameter for name in bindings for parameter in bindings[name].parameters}
    for version in stand_in.VERSIONS:
        methods = {name.rpartition(".")[2] for name in stand_in.SIGNATURES[version]}
        used = set()
        for node in ast.walk(ast.parse(inspect.getsource(mori_engine))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = ast.unparse(node.value)
                if owner == "self._engine":
                    assert node.attr in methods, node.attr
                elif owner in ("io", "self._io"):
                    assert node.attr in {*names, "IOEngine"}, node.attr
                elif owner.startswith(("io.", "self._io.", "locations")):
                    assert node.attr in members | {"unpack"}, node.attr
                elif owner == "self._status":
                    assert f"mori.io:TransferStatus.{node.attr}" in bindings
                else:
                    continue
                used.add(node.attr)
        assert len(used) > 20
        assert "TCP" not in used, "MORI aborts the process"
    source = "".join(inspect.getsource(module) for module in (mori, mori_reader, mori_plan, mori_descriptor))
    assert "self._io." not in source


@pytest.mark.parametrize("version", stand_in.VERSIONS)
def test_reads_with_every_version(version: str) -> None:
    transports = [open_over_stand_in(SETTINGS, version) for _ in range(2)]
    regions = [(KvRegion("only", torch.full((5, 64), value, dtype=torch.uint8)),) for value in (7, 0)]
    try:
        descriptors = [transport.export(mine) for transport, mine in zip(transports, regions)]
        transports[1].connect("peer", descriptors[0])
        transports[1].start_read(1, "peer", 0, (0, 3, 4), (4, 1, 2), Deadline.after(20))
        (completion,) = wait_for(transports[1], 1)
        assert (completion.error, completion.num_bytes) == (None, 3 * 64)
        assert regions[1][0].blocks.sum(dim=1).tolist() == [0, 7 * 64, 7 * 64, 0, 7 * 64]
    finally:
        for transport in transports:
            transport.close()


@pytest.mark.parametrize("error", [ImportError("No module named 'mori'"), OSError("libamdhip64.so.7: cannot open")])
def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "mori.io":
            raise error
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(TransferError, match=rf"ROCm.*amd-mori.*{error}"):
        open_transport("mori", SETTINGS)


def test_it_is_opened_by_name_alone_and_not_for_gpus_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mori", ModuleType("mori"))
    monkeypatch.setitem(sys.modules, "mori.io", stand_in.make_module())
    transport = open_transport("mori", SETTINGS)
    assert transport.name == "mori"
    transport.close()
    with pytest.raises(TransferError, match="by name"):
        open_transport("mori", TransportSettings(rank=0, host="127.0.0.1", secret=SECRET, is_named=False))
    monkeypatch.setattr(mori, "detect_platform", lambda: Platform(vendor="cuda", arch="sm_90", num_devices=1))
    with pytest.raises(TransferError, match="needs ROCm"):
        open_transport("mori", SETTINGS)


@pytest.mark.parametrize(
    ("host", "problem"),
    [("::1", "IPv4"), ("localhost", "IPv4"), ("0.0.0.0", "never on all"), ("192.0.2.1", "cannot listen on 192")],
)
def test_an_address_that_ends_the_process_never_gets_there(host: str, problem: str) -> None:
    with pytest.raises(TransferError, match=problem):
        open_over_stand_in(TransportSettings(rank=0, host=host, secret=SECRET))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(TransferError, match="16"):
        open_over_stand_in(TransportSettings(rank=0, host="127.0.0.1", secret=b"short"))


def test_without_a_nic_it_is_for_gpus_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORI_DISABLE_AUTO_XGMI", raising=False)
    FAULTS.has_nic = False
    transport = open_over_stand_in(SETTINGS)
    assert transport.name.startswith("mori@")
    with pytest.raises(TransferError, match="RDMA NIC"):
        transport.export((KvRegion("only", torch.zeros((4, 64), dtype=torch.uint8)),))
    transport.close()
    monkeypatch.setenv("MORI_DISABLE_AUTO_XGMI", "1")
    with pytest.raises(TransferError, match="no active RDMA device"):
        open_over_stand_in(SETTINGS)


def test_what_the_operator_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORI_IO_CP_TIMEOUT_MS", "300")
    monkeypatch.delenv("MORI_DISABLE_AUTO_XGMI", raising=False)
    open_over_stand_in(SETTINGS).close()
    assert (os.environ["MORI_IO_CP_TIMEOUT_MS"], os.environ["MORI_DISABLE_AUTO_XGMI"]) == ("300", "0")


# --- memory -------------------------------------------------------------------------------------------------------


def test_regions_larger_than_a_registration_are_read_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mori, "lay_out", partial(mori_plan.lay_out, max_chunk_bytes=1000))
    with two_ranks(num_blocks=100, block_bytes=64) as (reader, exporter):
        (region,) = DescriptorSeal(SECRET).open(exporter.descriptor).regions
        assert (region.blocks_per_chunk, len(region.chunks)) == (15, 7)
        order = torch.randperm(100, generator=torch.Generator().manual_seed(3)).tolist()
        assert reader.read(1, "peer", tuple(range(100)), tuple(order)).error is None
        assert torch.equal(reader.regions[0].blocks[order], exporter.regions[0].blocks)
        assert reader.read(2, "peer", tuple(range(100)), tuple(range(100))).error is None
        assert torch.equal(reader.regions[0].blocks, exporter.regions[0].blocks)


def test_too_much_to_describe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mori, "lay_out", partial(mori_plan.lay_out, max_chunk_bytes=64))
    transport = open_over_stand_in(SETTINGS)
    try:
        with pytest.raises(TransferError, match="1 regions in 4000 pieces are too many"):
            transport.export((KvRegion("only", torch.zeros((4000, 64), dtype=torch.uint8)),))
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"identity_bytes": b"short"}, "registered memory"),
        ({"engine": b"\xc1"}, "cannot read"),
        ({"identity": b""}, "cannot read"),
        ({"regions": "fewer blocks"}, "registered memory"),
        ({"regions": "overlap"}, "impossible shape"),
        ({"engine": "another"}, "another engine"),
    ],
)
def test_a_descriptor_whose_parts_do_not_belong_together_is_refused(change: dict[str, Any], problem: str) -> None:
    seal = DescriptorSeal(SECRET)
    with two_ranks(num_blocks=8) as (reader, exporter), rank_here(NAME) as other:
        descriptor = seal.open(exporter.descriptor)
        (region,) = descriptor.regions
        if change.get("regions") == "fewer blocks":
            shape = msgspec.structs.replace(region.shape, num_blocks=7)
            change = {"regions": (msgspec.structs.replace(region, shape=shape, blocks_per_chunk=7),)}
        elif change.get("regions") == "overlap":
            change = {"regions": (msgspec.structs.replace(region, stride_bytes=63),)}
        elif change.get("engine") == "another":
            change = {"engine": seal.open(other.descriptor).engine}
        with pytest.raises(TransferError, match=problem):
            reader.transport.connect("odd", seal.seal(msgspec.structs.replace(descriptor, **change)))
        with pytest.raises(TransferError, match="another secret"):
            reader.transport.connect("odd", DescriptorSeal(b"another secret of 16").seal(descriptor))


def test_the_stand_in_notices_what_would_crash() -> None:
    """So that it proves something when it does not."""
    io = stand_in.make_module()
    with rank_here(NAME, num_blocks=8, block_bytes=(64,)) as exporter:
        engine = io.IOEngine(key="k", config=io.IOEngineConfig(host="127.0.0.1", port=0))
        config = io.RdmaBackendConfig(qp_per_transfer=1, enable_notification=False)
        engine.create_backend(type=io.BackendType.RDMA, config=config)
        target = torch.zeros(64, dtype=torch.uint8)
        memory = engine.register_memory(ptr=target.data_ptr(), size=64, device_id=-1, mem_loc=io.MemoryLocationType.CPU)
        remote = DescriptorSeal(SECRET).open(exporter.descriptor)
        engine.register_remote_engine(engine_desc=io.EngineDesc.unpack(remote.engine))
        chunk = io.MemoryDesc.unpack(remote.regions[0].chunks[0])
        FAULTS.before_write = gate = Gate(lambda transfer, segment: True)
        kept = engine.batch_read([memory], [[0]], [chunk], [[0]], [[64]], [0])
        engine.batch_read([memory], [[0]], [chunk], [[0]], [[64]], [1])
        assert CRIMES == ["a status was dropped that MORI still writes to"]
        gate.opened.set()
        FAULTS.loses_statuses = True
        engine.remove_backend(type=io.BackendType.RDMA)
        kept[0].code = stand_in.StatusCode.IN_PROGRESS
        assert kept[0].InProgress()
        assert CRIMES[1:] == ["a status was asked after its engine had closed"]
        CRIMES.clear()
        with pytest.raises(AssertionError, match="by keyword"):
            engine.remove_backend(io.BackendType.RDMA)
        with pytest.raises(TypeError):
            engine.register_memory(ptr=1, size=1, device=-1, mem_loc=None)
