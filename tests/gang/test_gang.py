"""Gangs of real Ray actors in real processes, with ranks that have no model."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from atom_cluster.config.parallel import ParallelConfig
from atom_cluster.errors import GangError
from atom_cluster.gang.gang import Gang
from atom_cluster.gang.placement import bundles, strategy
from atom_cluster.gang.spec import GangSpec, ModelRanks, SimulatedRank
from atom_cluster.runner.options import RunnerOptions
from tests.tiny_models import tiny_model_dir

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PARALLEL = ParallelConfig(tensor=2)


def make_spec(behaviour: str = "ok", *, start_timeout_s: float = 60.0, step_timeout_s: float = 60.0) -> GangSpec:
    return GangSpec(
        ranks=ModelRanks(
            options=RunnerOptions(model_dir=behaviour, num_threads=1),
            num_ranks=2,
            factory="tests.gang.fake_ranks:build",
        ),
        host_factory="tests.gang.fake_ranks:FakeHost",
        host_settings="replica-1",
        start_timeout_s=start_timeout_s,
        step_timeout_s=step_timeout_s,
        stop_timeout_s=2.0,
    )


@pytest.fixture
async def group() -> AsyncIterator[PlacementGroup]:
    made = placement_group(bundles(PARALLEL, "cpu", {}), strategy=strategy(PARALLEL, "cpu"))
    await asyncio.to_thread(ray.get, made.ready())
    yield made
    remove_placement_group(made)


async def pids(gang: Gang) -> list[int]:
    return [(await gang.ping(rank)).pid for rank in range(2)]


async def wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 15
    while is_alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        await asyncio.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def wait_for_failure(gang: Gang) -> str:
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        try:
            await gang.check()
        except GangError as exc:
            return str(exc)
        await asyncio.sleep(0.05)
    raise AssertionError("the gang is still well")


async def test_a_gang_starts_serves_and_leaves_nothing_behind(group: PlacementGroup) -> None:
    gang = await Gang.start(make_spec(), group)
    assert gang.card.address.peer_id == "replica-1"
    assert gang.card.choices == {"offers": "2", "plan_channel": "shared memory"}
    deadline_s = time.monotonic() + 15
    while (await gang.check()).num_running < 3:
        assert time.monotonic() < deadline_s, "the engine makes no steps"
    assert not await gang.is_idle()
    await gang.begin_drain(5.0)
    assert await gang.is_idle()
    statuses = [await gang.ping(rank) for rank in range(2)]
    assert [status.rank for status in statuses] == [0, 1]
    assert all(status.step_id >= 2 and status.phase == "working" for status in statuses)
    await gang.stop()
    for status in statuses:
        await wait_until_gone(status.pid)
    await gang.stop()


async def test_ranks_that_share_a_real_model_find_each_other(group: PlacementGroup) -> None:
    options = RunnerOptions(
        model_dir=str(tiny_model_dir("llama")), num_blocks=8, max_num_requests=2, num_threads=1, kv_transport="auto"
    )
    fakes = make_spec()
    spec = dataclasses.replace(fakes, ranks=ModelRanks(options=options, num_ranks=2))
    gang = await Gang.start(spec, group)
    assert gang.card.num_blocks == 8
    assert gang.card.choices == {"offers": "2", "plan_channel": "shared memory"}
    await gang.check()
    await gang.stop()


async def test_a_killed_follower_fails_the_check_and_the_engine(group: PlacementGroup) -> None:
    gang = await Gang.start(make_spec(), group)
    leader, follower = await pids(gang)
    os.kill(follower, signal.SIGKILL)
    assert "rank 1" in await wait_for_failure(gang)
    status = await gang.ping(0)
    deadline_s = time.monotonic() + 10
    while status.failure is None and time.monotonic() < deadline_s:
        status = await gang.ping(0)
    assert "rank 1 is gone" in str(status.failure)
    await gang.stop()
    await wait_until_gone(leader)


async def test_followers_exit_when_rank_0_is_killed_even_in_the_middle_of_a_step(group: PlacementGroup) -> None:
    gang = await Gang.start(make_spec("hang_step:1"), group)
    leader, follower = await pids(gang)
    os.kill(leader, signal.SIGKILL)
    await wait_until_gone(follower)
    await gang.stop()


async def test_a_rank_stuck_in_a_step_fails_the_check(group: PlacementGroup) -> None:
    gang = await Gang.start(make_spec("hang_step:1", step_timeout_s=1.0), group)
    assert "rank 1 has been busy with step 0" in await wait_for_failure(gang)
    await gang.stop()


async def test_a_rank_that_cannot_load_fails_the_start_and_ends_all(group: PlacementGroup) -> None:
    with pytest.raises(GangError, match="rank 1: ConfigError: rank 1 of 2 has no such model"):
        await Gang.start(make_spec("fail_load:1"), group)
    again = await Gang.start(make_spec(), group)
    await again.stop()


async def test_a_start_that_takes_too_long_is_given_up(group: PlacementGroup) -> None:
    with pytest.raises(GangError, match=r"not ready within 0.01 s"):
        await Gang.start(make_spec(start_timeout_s=0.01), group)


async def test_a_group_with_other_bundles_is_refused(group: PlacementGroup) -> None:
    spec = GangSpec(
        ranks=SimulatedRank(factory="tests.gang.fake_ranks:build", argument=None),
        host_factory="tests.gang.fake_ranks:FakeHost",
        host_settings="",
    )
    with pytest.raises(GangError, match="1 ranks and a head need as many bundles; there are 3"):
        await Gang.start(spec, group)


@ray.remote(num_cpus=0.01)
class Head:
    """As in a Serve replica: an async actor in the first bundle of its group."""

    async def start(self, spec: GangSpec) -> list[int]:
        self.gang = await Gang.start(spec)
        return await pids(self.gang)


async def test_workers_die_with_the_head_that_owns_them(group: PlacementGroup) -> None:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    head = Head.options(scheduling_strategy=strategy).remote()
    workers = await head.start.remote(make_spec())
    assert all(is_alive(pid) for pid in workers)
    ray.kill(head)
    for pid in workers:
        await wait_until_gone(pid)
