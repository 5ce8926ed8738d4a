from __future__ import annotations

import subprocess
import sys

import pytest

from atom_cluster.errors import ConfigError, TransferError
from atom_cluster.kv_transfer.registry import TransportSettings, available, missing, open_transport
from tests.kv_transfer.ranks import SECRET


def test_transports_are_listed_best_first_by_device() -> None:
    for device, best in (("cpu", "shm"), ("cuda", "ipc")):
        names = available(device)
        assert (names[0], names[-1]) == (best, "tcp")


@pytest.mark.parametrize("name", available("cpu"))
def test_every_listed_transport_opens_under_its_name(name: str) -> None:
    transport = open_transport(name, TransportSettings(rank=0, host="127.0.0.1", secret=SECRET))
    assert transport.name.partition("@")[0] == name
    transport.close()


def test_transports_without_their_library_are_left_out_and_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available("cpu") == ("shm", "tcp")
    assert missing("cpu") == {"nixl": "not installed (nixl_cu13 or nixl_cu12 or nixl)"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "nixl" else None)
    assert "nixl" in available("cpu")
    assert missing("cpu") == {}


def test_an_unknown_name_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'pigeon'; there are shm, ipc, .*tcp"):
        open_transport("pigeon", TransportSettings(rank=0, host="127.0.0.1", secret=SECRET))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(TransferError, match="16"):
        open_transport("tcp", TransportSettings(rank=0, host="127.0.0.1", secret=b"short"))


def test_settings_do_not_show_the_secret() -> None:
    assert "secret" not in repr(TransportSettings(rank=0, host="127.0.0.1", secret=SECRET))


def test_the_registry_and_the_combiner_import_without_torch() -> None:
    modules = "atom_cluster.kv_transfer.registry, atom_cluster.kv_transfer.combine"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
