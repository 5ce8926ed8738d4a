"""Gang: the worker actors of one replica, as its head sees them. All of them start or none does; one failing ends all.

The head owns the actors, so they die with it; followers also exit when rank 0 does. Restarting is Serve's business:
the head raises what `check` raised, and Serve replaces the whole replica. Knows no Serve, no engine and no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from atom_cluster.errors import GangError
from atom_cluster.gang.placement import rank_bundles, rank_resources
from atom_cluster.gang.spec import GangSpec, ModelRanks
from atom_cluster.gang.worker import Reservation, Worker, WorkerStatus
from atom_cluster.messages.cluster import EngineStatus, MemberCard

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_WORKER_THREADS = 8
"""Calls that one worker answers at the same time: pings must get through while it loads or drains."""


class Gang:
    """A gang that runs. Made by `Gang.start`, ended by `stop`; all methods from one event loop."""

    def __init__(self, spec: GangSpec, workers: Sequence[ray.actor.ActorHandle]) -> None:
        """Use `Gang.start`."""
        self._spec = spec
        self._workers = tuple(workers)
        self._card: MemberCard | None = None

    @classmethod
    async def start(cls, spec: GangSpec, placement_group: PlacementGroup | None = None) -> Gang:
        """Start all ranks on a placement group made from `placement.bundles`; by default the one this actor runs in.

        Raises `GangError` that names the rank and its error when any of them fails or time is up; then all are gone.
        """
        group = placement_group or get_current_placement_group()
        if group is None:
            raise GangError("a gang needs a placement group")
        table = await asyncio.to_thread(placement_group_table, group)
        nodes = [node for _, node in sorted(table["bundles_to_node_id"].items())]
        if len(nodes) != spec.ranks.num_ranks + 1:
            raise GangError(f"{spec.ranks.num_ranks} ranks and a head need as many bundles; there are {len(nodes)}")
        gang = cls(spec, [_create(spec, rank, group, index) for rank, index in enumerate(rank_bundles(nodes))])
        try:
            gang._card = await asyncio.wait_for(gang._start_ranks(), spec.start_timeout_s)
        except asyncio.TimeoutError as exc:
            raise GangError(f"the gang was not ready within {spec.start_timeout_s} s") from exc
        finally:
            if gang._card is None:
                gang.kill()
        return gang

    @property
    def card(self) -> MemberCard:
        """What to announce about the engine."""
        if self._card is None:
            raise GangError("the gang has not started")
        return self._card

    async def check(self) -> EngineStatus:
        """Ping all ranks at once; how the engine is doing.

        Raises `GangError` if any rank is dead, stuck or failed; the gang is then of no more use.
        """
        statuses = await asyncio.gather(*(self.ping(rank) for rank in range(len(self._workers))))
        for status in statuses:
            if status.failure is not None:
                raise GangError(f"rank {status.rank} failed: {status.failure}")
            if status.busy_s > self._spec.step_timeout_s:
                raise GangError(
                    f"rank {status.rank} has been busy with step {status.step_id} for {status.busy_s:.0f} s"
                )
        engine = statuses[0].engine
        if engine is None:
            raise GangError("rank 0 serves no engine")
        return engine

    async def ping(self, rank: int) -> WorkerStatus:
        """How one rank is doing. Raises `GangError` if it is dead or does not answer."""
        status: WorkerStatus = await self._call(rank, self._workers[rank].ping.remote())
        return status

    async def stop(self) -> None:
        """Let every rank release what it holds, then end the processes. Idempotent; never raises for a dead rank."""
        timeout_s = self._spec.stop_timeout_s
        stops = (asyncio.wait_for(worker.stop.remote(timeout_s), timeout_s) for worker in self._workers)
        outcomes = await asyncio.gather(*stops, return_exceptions=True)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                _log.warning("rank %d did not stop by itself: %s", rank, _reason(outcome))
        self.kill()

    def kill(self) -> None:
        """End the processes at once. Idempotent."""
        for worker in self._workers:
            ray.kill(worker, no_restart=True)

    async def begin_drain(self, timeout_s: float) -> None:
        """Take no more requests; finish those there are, and let others go on with what is left after so long.

        Raises `GangError` if rank 0 is dead or does not answer.
        """
        await self._call(0, self._workers[0].begin_drain.remote(timeout_s))

    async def is_idle(self) -> bool:
        """Whether no request is left. Raises `GangError` as `begin_drain` does."""
        return bool(await self._call(0, self._workers[0].is_idle.remote()))

    async def _start_ranks(self) -> MemberCard:
        spec = self._spec
        places: list[Reservation] = await self._all([worker.reserve.remote() for worker in self._workers])
        _log.info("ranks on nodes %s", [place.host for place in places])
        loads = [worker.load.remote(part) for worker, part in zip(self._workers, _parts(spec, places))]
        infos = await self._all(loads)
        first, followers = self._workers[0], self._workers[1:]
        joins: list[Awaitable[None]] = []
        if followers:
            node_by_rank = {rank: place.node for rank, place in enumerate(places) if rank > 0}
            addresses = (await self._all([first.listen.remote(node_by_rank, places[0].host, spec.step_timeout_s)]))[0]
            _log.info("plans are broadcast over %s", addresses.describe())
            joins = [worker.follow.remote(addresses, spec.start_timeout_s) for worker in followers]
        served = first.serve.remote(infos, spec.host_factory, spec.host_settings, spec.start_timeout_s)
        card: MemberCard = (await self._all([served, *joins]))[0]
        return card

    async def _call(self, rank: int, call: Awaitable[_T]) -> _T:
        """Result of a call that every healthy rank answers at once."""
        return await _named(rank, asyncio.wait_for(call, self._spec.ping_timeout_s))

    async def _all(self, calls: Iterable[Awaitable[Any]]) -> list[Any]:
        """Results of one call per rank, in order; the first failure is raised at once, with the rank's name."""
        return await asyncio.gather(*(_named(rank, call) for rank, call in enumerate(calls)))


def _create(spec: GangSpec, rank: int, group: PlacementGroup, bundle_index: int) -> ray.actor.ActorHandle:
    resources = rank_resources(spec.device, spec.resources_per_rank)
    num_threads = spec.ranks.options.num_threads if isinstance(spec.ranks, ModelRanks) else None
    options: dict[str, Any] = {} if num_threads is None else {"env_vars": {"OMP_NUM_THREADS": str(num_threads)}}
    actor = ray.remote(Worker).options(
        num_cpus=resources.pop("CPU"),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        max_concurrency=_WORKER_THREADS,
        max_restarts=0,
        max_task_retries=0,
        runtime_env=options,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle_index),
    )
    return actor.remote(rank, spec.name, spec.log_level, spec.log_format)


def _parts(spec: GangSpec, places: Sequence[Reservation]) -> list[object]:
    """What each rank is to load: the common options, with its own place among the others."""
    ranks = spec.ranks
    if not isinstance(ranks, ModelRanks):
        return [ranks]
    host = f"[{places[0].host}]" if ":" in places[0].host else places[0].host
    return [
        dataclasses.replace(
            ranks,
            options=dataclasses.replace(
                ranks.options,
                rank=rank,
                world_size=len(places),
                init_method=f"tcp://{host}:{places[0].port}",
                host=place.host,
            ),
        )
        for rank, place in enumerate(places)
    ]


async def _named(rank: int, call: Awaitable[_T]) -> _T:
    try:
        return await call
    except (RayError, asyncio.TimeoutError) as exc:
        raise GangError(f"rank {rank}: {_reason(exc)}") from exc


def _reason(exc: BaseException) -> str:
    """A Ray error in one line."""
    if isinstance(exc, RayTaskError):
        return f"{type(exc.cause).__name__}: {exc.cause}"
    if isinstance(exc, RayActorError):
        return "its process is dead"
    if isinstance(exc, asyncio.TimeoutError):
        return "it does not answer"
    return str(exc)
