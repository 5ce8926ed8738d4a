"""The head actor of one prefill, decode or unified replica: what Serve sees of it. Next: atom_cluster/gang/gang.py.

The head holds no model, runs no step and carries no token. It starts the gang on the placement group that Serve made
for the replica, announces it to the router, reports its health and load to Serve, and on the way out lets it finish
its requests. A dead or stuck rank makes the head unhealthy; Serve then replaces the whole replica, gang included.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from ray import serve
from ray.serve.handle import DeploymentHandle

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import GangError
from atom_cluster.gang.gang import Gang
from atom_cluster.gang.ray_metrics import RayMetrics
from atom_cluster.messages.cluster import EngineStatus, MemberCard, Role
from atom_cluster.observability.metrics import GANG_FAILED_CHECKS, GANG_HEALTHY, GANG_START_S
from atom_cluster.serving.autoscaling import REQUESTS
from atom_cluster.serving.gang_settings import gang_spec
from atom_cluster.serving.membership import Announcer
from atom_cluster.serving.recording import set_up_logs

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.1
_MOVE_S, _MOVE_SHARE = 2.0, 0.2
"""Of the time to drain, at most so many seconds and this share are left for requests that move to be gone."""


class EngineReplica:
    """Serve deployment class of all three roles. Serve restarts it when `check_health` raises."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, reasons: dict[str, str], role: Role, router: DeploymentHandle
    ) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        set_up_logs(config.observability, role=role, replica=f"{role}-{replica_id}")
        self._config = config
        self._is_draining = False
        self._status: EngineStatus | None = None
        peer_id = f"{role}-{replica_id}"
        self._metrics = RayMetrics(labels={"role": "head", "replica": peer_id})
        began_s = time.monotonic()
        self._gang = await Gang.start(gang_spec(config, reasons, role=role, peer_id=peer_id))
        self._metrics.set(GANG_START_S, time.monotonic() - began_s)
        self._announcer = Announcer(router=router, card=self._card, period_s=config.serving.announce_period_s)
        self._announcer.start()

    def _card(self) -> MemberCard:
        return msgspec.structs.replace(self._gang.card, is_draining=self._is_draining, status=self._status)

    async def check_health(self) -> None:
        """Called by Serve every `health_check_period_s`. Raises when a rank is dead or stuck."""
        try:
            self._status = await self._gang.check()
        except Exception:
            self._metrics.set(GANG_HEALTHY, 0)
            self._metrics.inc(GANG_FAILED_CHECKS)
            # The router must not wait for Serve's verdict, which takes several failed checks.
            await self._announcer.withdraw()
            raise
        self._metrics.set(GANG_HEALTHY, 1)
        if not self._is_draining:
            # Serve forgives a single failed check, so a gang that was only slow to answer must be found again.
            self._announcer.start()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Load for Serve's autoscaler: requests that this engine runs or has waiting."""
        status = self._status
        return {REQUESTS: 0.0 if status is None else float(status.num_running + status.num_waiting)}

    async def __del__(self) -> None:
        """Serve calls and awaits this when the replica stops: drain, then tear down."""
        if not hasattr(self, "_announcer"):
            return
        self._is_draining = True
        await self._announcer.stop()
        await self._announcer.announce_now()
        try:
            await self._drain()
        except GangError as exc:
            # Its requests wait for nothing here; they go on elsewhere as soon as its processes are gone.
            logger.warning("the gang is ended at once, without finishing its requests: %s", exc)
            self._gang.kill()
            await self._announcer.withdraw()
            return
        await self._announcer.withdraw()
        await self._gang.stop()

    async def _drain(self) -> None:
        timeout_s = self._config.serving.drain_timeout_s
        deadline_s = time.monotonic() + timeout_s
        await self._gang.begin_drain(timeout_s - min(_MOVE_S, timeout_s * _MOVE_SHARE))
        # The engine is in another process: there is no event to wait for.
        while time.monotonic() < deadline_s and not await self._gang.is_idle():
            # An engine whose other ranks are dead or stand still has requests that never end.
            await self._gang.check()
            await asyncio.sleep(_DRAIN_POLL_S)
