"""The flood accepts whole answers and refusals that say when to come back, and nothing else."""

from __future__ import annotations

import pytest

from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.flood import Ending, check, flood, summary, until_served


def served(end_s: float = 2.0, *, is_whole: bool = True) -> Ending:
    return Ending(200, end_s / 2, end_s, None, is_whole)


def refused(status: int = 503, retry_after_s: int | None = 1) -> Ending:
    return Ending(status, 0.1, 0.1, retry_after_s, is_whole=False)


def test_served_and_refused_are_the_only_good_endings() -> None:
    check([served(), refused(), refused(429)])
    for bad in (served(is_whole=False), refused(503, None), refused(503, 0), refused(500), refused(400)):
        with pytest.raises(DrillError, match="otherwise"):
            check([served(), bad])


def test_the_summary_tells_numbers_and_times() -> None:
    found = summary([served(1), served(3), served(2), refused()])
    assert (found["connections"], found["served"], found["refused"]) == (4, 3, 1)
    assert (found["served_end_p50_s"], found["served_end_max_s"], found["refused_end_max_s"]) == (2, 3, 0.1)


def test_whoever_comes_back_as_told_is_served() -> None:
    answers, waits = iter([refused(503, 2), refused(429, 3), served()]), list[float]()
    endings = until_served(lambda: next(answers), sleep=waits.append)
    assert [ending.status for ending in endings] == [503, 429, 200]
    assert waits == [2, 3]


def test_who_is_refused_for_ever_is_told_of() -> None:
    with pytest.raises(DrillError, match=r"refused 2 times.* more than 10 s"):
        until_served(lambda: refused(503, 5), timeout_s=10, sleep=lambda seconds: None)
    with pytest.raises(DrillError, match="otherwise"):
        until_served(lambda: refused(500))


def test_another_host_is_not_flooded() -> None:
    with pytest.raises(DrillError, match="not this host"):
        flood(RunningCluster("http://192.0.2.1:80"))
