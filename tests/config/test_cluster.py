from __future__ import annotations

import pytest

from atom_cluster.config.load import load_args
from atom_cluster.errors import ConfigError


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "either `prefill` and `decode`, or `unified`"),
        ({"prefill": {}}, "come together"),
        ({"decode": {}, "unified": {}}, "come together"),
        ({"prefill": {}, "decode": {}, "unified": {}}, "not both"),
        ({"prefill": {"block_size": 24}, "decode": {}}, "one must be a multiple"),
        ({"unified": {"parallel": {"tensor": 4, "expert": 2}}}, "must be 1 or the same as `tensor`"),
        ({"unified": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "above max_replicas"),
        ({"unified": {}, "serving": {"member_timeout_s": 0.1}}, "above announce_period_s"),
        ({"unified": {}, "serving": {"client_timeout_s": 0.1}}, "above ping_period_s"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(groups: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_args({"model": "m", **groups})


def test_groups_are_listed_by_role() -> None:
    assert list(load_args({"model": "m", "prefill": {}, "decode": {}}).groups()) == ["prefill", "decode"]
    assert list(load_args({"model": "m", "unified": {}}).groups()) == ["unified"]


def test_max_ranks_counts_a_group_scaled_up() -> None:
    group = load_args({"model": "m", "unified": {"replicas": 3, "parallel": {"tensor": 2}}}).groups()["unified"]
    assert group.max_ranks == 6
    scaled = {"autoscaling": {"max_replicas": 5}, "parallel": {"tensor": 2}}
    assert load_args({"model": "m", "unified": scaled}).groups()["unified"].max_ranks == 10
