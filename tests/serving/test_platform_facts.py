"""The facts about a Ray cluster are those of its living nodes together."""

from __future__ import annotations

import pytest
import ray

from atom_cluster.serving.platform_facts import cluster_facts


@pytest.mark.parametrize(
    ("alive", "resources", "num_gpus", "is_single_host"),
    [
        ([True], {"CPU": 4.0}, 0, True),
        ([True, True], {"CPU": 8.0, "GPU": 16.0}, 16, False),
        ([True, False], {"CPU": 4.0, "GPU": 8.0}, 8, True),
    ],
)
def test_gpus_of_all_nodes_count(
    monkeypatch: pytest.MonkeyPatch,
    alive: list[bool],
    resources: dict[str, float],
    num_gpus: int,
    is_single_host: bool,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": is_alive} for is_alive in alive])
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    facts = cluster_facts()
    assert (facts.num_gpus, facts.is_single_host) == (num_gpus, is_single_host)
