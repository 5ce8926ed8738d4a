"""The drill that upgrades: another version answers alike and has another fingerprint; what was seen is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.messages.cluster import EngineStatus, PeerAddress
from atom_cluster.runner.fingerprint import _config_digest, weights_identity
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.record import Record
from atom_cluster.tools.drill.upgrade import SideBySide, another_version, upgrade
from atom_cluster.tools.drill.watch import EngineWatch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (directory / "model.safetensors").write_bytes(b"weights" * 100)
    return directory


def test_another_version_has_the_same_weights_and_another_fingerprint(model: Path, tmp_path: Path) -> None:
    config = ClusterConfig.model_validate({"model": str(model), "unified": {"device": "cpu"}})
    first, second = (another_version(config, tmp_path) for _ in range(2))
    directories = [model, Path(first.model), Path(second.model)]
    assert len({_config_digest(directory) for directory in directories}) == 3
    assert len({weights_identity(directory, load_format="auto", seed=0) for directory in directories}) == 1
    assert first.model_copy(update={"model": config.model}) == config
    assert json.loads((model / "config.json").read_text()) == {"model_type": "llama", "hidden_size": 8}


class Versions(RunningCluster, EngineWatch):
    """Engines as /v1/cluster shows them and as they answer; the same at any time. One object plays both parts."""

    def __init__(self, engines: dict[str, tuple[str, str, int, int]]) -> None:
        """By id: role, fingerprint, tickets, mismatches."""
        self._engines = engines
        self.num_asked = 0
        super().__init__("http://127.0.0.1:1")

    def get(self, path: str, *, timeout_s: float = 60.0) -> object:
        return {
            "replicas": [
                {"id": key, "role": role, "fingerprint": version, "endpoint": "tcp://10.0.0.1:1", "epoch": 1}
                for key, (role, version, _, _) in self._engines.items()
            ]
        }

    def statuses(self, engines: Iterable[PeerAddress]) -> dict[str, EngineStatus]:
        self.num_asked += 1
        return {
            key: EngineStatus(
                num_running=0, num_waiting=0, num_tickets=tickets, num_mismatches=mismatches, blocks_by_state={}
            )
            for key, (_, _, tickets, mismatches) in self._engines.items()
        }


def seen(versions: Versions) -> SideBySide:
    with SideBySide(versions, versions) as found:
        versions.wait_until(lambda: versions.num_asked >= 3)
    return found


BOTH = {
    "a": ("prefill", "1", 1, 0),
    "b": ("decode", "1", 1, 0),
    "c": ("prefill", "2", 0, 0),
    "d": ("decode", "2", 1, 0),
}


def test_two_versions_of_both_roles_are_side_by_side() -> None:
    found = seen(Versions(BOTH))
    assert found.seconds > 0.1 and found.num_versions_handing_over == 2 and found.num_mismatches == 0


def test_a_version_with_one_role_only_is_not_side_by_side() -> None:
    found = seen(Versions({key: engine for key, engine in BOTH.items() if key != "c"}))
    assert found.seconds == 0.0 and found.num_versions_handing_over == 0


def test_mismatches_of_all_engines_are_counted() -> None:
    assert seen(Versions({**BOTH, "c": ("prefill", "2", 0, 3), "d": ("decode", "2", 0, 1)})).num_mismatches == 4


def test_only_a_cluster_of_its_own_is_upgraded() -> None:
    versions = Versions(BOTH)
    with pytest.raises(DrillError, match="started"):
        upgrade(versions, versions)


def test_a_record_has_what_is_needed_to_repeat_it_from_the_first_row_on(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    record = Record(output, names=["all"], num_clients=7)
    record.add("scenarios", {"scenario": "x"})
    record.add("cancel", {"phase": "y"})
    found = json.loads(output.read_text())
    assert found["scenarios"] == [{"scenario": "x"}] and found["cancel"] == [{"phase": "y"}]
    assert {"benchmark", "command", "commit", "time", "hardware", "software", "drills", "num_clients"} <= found.keys()
    Record(None, names=[], num_clients=1).add("scenarios", {})
