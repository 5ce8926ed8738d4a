"""Announcing oneself: how members find each other through Serve alone.

Every member calls the router's deployment handle once per period with its card and gets everybody's cards back. Serve
finds the router wherever it was restarted, so there is no registry of our own, and a new router knows the whole
cluster after one period. Between answers, and while the router is away, members keep the last view. This is the only
traffic of ours that Serve carries.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ray.serve.handle import DeploymentHandle

from atom_cluster.messages.cluster import MemberCard, Membership

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0


class Announcer:
    """Announces a member periodically. `start` inside a running event loop; both it and `stop` are idempotent."""

    def __init__(
        self,
        *,
        router: DeploymentHandle,
        card: Callable[[], MemberCard],
        period_s: float,
        on_membership: Callable[[Membership], None] | None = None,
    ) -> None:
        """`card` is asked anew each time; `on_membership` gets every answer, on the event loop."""
        self._router = router
        self._card = card
        self._period_s = period_s
        self._on_membership = on_membership
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Announce now and from now on, unless that is what it does already."""
        if self._task is not None:
            return
        self._task = asyncio.get_running_loop().create_task(self._announce_forever())

    async def announce_now(self) -> Membership | None:
        """Announce once, out of turn; None when the router did not answer."""
        try:
            response = self._router.announce.remote(self._card())
            membership = await asyncio.wait_for(response, _ANSWER_TIMEOUT_S)
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # noqa: BLE001  Supervisor: whatever ails the router or Serve, the next round tries again.
            logger.info("the router did not take an announcement: %s", type(exc).__name__)
            return None
        if not isinstance(membership, Membership):
            raise TypeError(f"the router answered an announcement with {type(membership).__name__}")
        return membership

    async def withdraw(self) -> None:
        """Tell the router that this member is gone, instead of letting it find out."""
        await self.stop()
        try:
            await asyncio.wait_for(self._router.withdraw.remote(self._card().address), _ANSWER_TIMEOUT_S)
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # noqa: BLE001  Best effort on the way out; the member times out anyway.
            logger.info("the router did not take a withdrawal: %s", type(exc).__name__)

    async def stop(self) -> None:
        """Announce no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _announce_forever(self) -> None:
        # `wait_for` may forget that it was cancelled (before Python 3.12), so the cancellation alone would not do.
        while self._task is asyncio.current_task():
            membership = await self.announce_now()
            if membership is not None and self._on_membership is not None:
                self._on_membership(membership)
            await asyncio.sleep(self._period_s)
