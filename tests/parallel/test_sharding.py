"""Who holds which part of an axis."""

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.parallel.sharding import Span, even_span, expert_span, kv_head_span


def group(rank: int, size: int) -> Group:
    return Group(rank=rank, size=size, handle=None)


def test_even_spans_cover_the_axis_in_order() -> None:
    assert [even_span(12, group(rank, 3), what="dims", unit=2) for rank in range(3)] == [
        Span(0, 4),
        Span(4, 4),
        Span(8, 4),
    ]


def test_units_are_never_cut() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 2 does not divide the model's 3 heads"):
        even_span(12, group(0, 2), what="heads", unit=4)


def test_key_value_heads_are_divided_or_shared() -> None:
    assert [kv_head_span(4, 8, group(rank, 2)).start for rank in range(2)] == [0, 16]
    assert [kv_head_span(2, 8, group(rank, 4)) for rank in range(4)] == [Span(0, 8)] * 2 + [Span(8, 8)] * 2
    with pytest.raises(ConfigError, match="key/value heads"):
        kv_head_span(3, 8, group(0, 4))


def test_experts_are_divided_whole() -> None:
    assert [expert_span(6, group(rank, 3)) for rank in range(3)] == [Span(0, 2), Span(2, 2), Span(4, 2)]
    with pytest.raises(ConfigError, match=r"parallel\.expert = 4 does not divide the model's 6 experts"):
        expert_span(6, group(0, 4))


def test_a_gang_of_one_connects_to_nothing() -> None:
    groups = ProcessGroups.connect(rank=0, world_size=1, init_method="", device=torch.device("cpu"))
    assert groups.tensor == group(0, 1)
    groups.close()
    with pytest.raises(ConfigError, match="rank 2"):
        ProcessGroups.connect(rank=2, world_size=2, init_method="", device=torch.device("cpu"))
