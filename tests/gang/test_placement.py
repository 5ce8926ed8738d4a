from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.config.parallel import ParallelConfig
from atom_cluster.gang.placement import bundles, rank_bundles, strategy


def test_the_head_comes_first_and_each_rank_has_a_bundle() -> None:
    assert bundles(ParallelConfig(tensor=2), "cuda", {"decode": 1}) == [
        {"CPU": 0.01},
        {"CPU": 0.01, "GPU": 1.0, "decode": 1},
        {"CPU": 0.01, "GPU": 1.0, "decode": 1},
    ]


def test_ranks_on_cpus_fit_a_small_machine_and_no_bundle_is_empty() -> None:
    found = bundles(ParallelConfig(tensor=8), "cpu", {})
    assert sum(bundle["CPU"] for bundle in found) < 1
    assert all(amount > 0 for bundle in found for amount in bundle.values())


@pytest.mark.parametrize(
    ("tensor", "device", "expected"), [(8, "cuda", "STRICT_PACK"), (16, "cuda", "PACK"), (2, "cpu", "PACK")]
)
def test_gpu_ranks_that_fit_one_host_must_share_it(tensor: int, device: str, expected: str) -> None:
    assert strategy(ParallelConfig(tensor=tensor), device) == expected  # type: ignore[arg-type]


def test_ranks_of_the_head_node_come_first() -> None:
    assert rank_bundles(["b", "a", "b", "a", "a", "b"]) == [2, 5, 1, 3, 4]


def test_the_largest_node_comes_first_when_the_head_is_elsewhere() -> None:
    assert rank_bundles(["head", "a", "b", "b", "c"]) == [2, 3, 1, 4]


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=20))
def test_every_bundle_but_the_heads_is_used_once_and_nodes_are_not_torn_apart(nodes: list[str]) -> None:
    order = rank_bundles(nodes)
    assert sorted(order) == list(range(1, len(nodes)))
    visited = [nodes[index] for index in order]
    changes = sum(left != right for left, right in zip(visited, visited[1:]))
    assert changes == len(set(visited)) - 1
