"""ProfileCalls: profiler windows of several engines at once, asked for over the endpoint that requests use.

Every engine answers for itself; one that is lost or does not answer spoils nothing for the others. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.errors import InvalidRequest, NotReady, ProfileRefused
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 300.0
"""Long: the traces of many steps of many layers take minutes to write."""


class ProfileCalls:
    """Calls of one ingress that engines have yet to answer. Used from one event loop."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._open: dict[tuple[str, int], asyncio.Future[ProfileAnswer]] = {}

    async def start(self, endpoint: Endpoint, engines: Iterable[MemberCard], request: ProfileRequest) -> dict[str, Any]:
        """Open windows; what each engine said. Raises as `stop` does."""

        def ask(call_id: int) -> StartProfile:
            return StartProfile(
                call_id=call_id,
                num_steps=request.num_steps,
                with_stack=request.with_stack,
                record_shapes=request.record_shapes,
            )

        return await self._call(endpoint, _chosen(engines, request), ask, _START_TIMEOUT_S)

    async def stop(self, endpoint: Endpoint, engines: Iterable[MemberCard], target: ProfileTarget) -> dict[str, Any]:
        """Close windows; what each engine said, traces included, once they are written.

        Raises `InvalidRequest` when no engine is meant, `ProfileRefused` when all of them refuse.
        """
        return await self._call(
            endpoint, _chosen(engines, target), lambda call_id: StopProfile(call_id=call_id), _STOP_TIMEOUT_S
        )

    def receive(self, source: str, answer: ProfileAnswer) -> None:
        """Take an engine's answer."""
        future = self._open.get((source, answer.call_id))
        if future is not None and not future.done():
            future.set_result(answer)

    def lose(self, peer_id: str) -> None:
        """An engine is gone, and its traces with it."""
        for (engine, call_id), future in self._open.items():
            if engine == peer_id and not future.done():
                future.set_result(ProfileAnswer(call_id=call_id, error="the replica was lost"))

    async def _call(
        self,
        endpoint: Endpoint,
        engines: Sequence[MemberCard],
        ask: Callable[[int], StartProfile | StopProfile],
        timeout_s: float,
    ) -> dict[str, Any]:
        answers = await asyncio.gather(
            *(self._ask(endpoint, card, ask(next(self._ids)), timeout_s) for card in engines)
        )
        if all(answer.error is not None and not answer.files for answer in answers):
            raise ProfileRefused(
                "; ".join(f"{card.address.peer_id}: {answer.error}" for card, answer in zip(engines, answers))
            )
        return {"replicas": [_entry(card, answer) for card, answer in zip(engines, answers)]}

    async def _ask(
        self, endpoint: Endpoint, card: MemberCard, message: StartProfile | StopProfile, timeout_s: float
    ) -> ProfileAnswer:
        key = (card.address.peer_id, message.call_id)
        answer: asyncio.Future[ProfileAnswer] = asyncio.get_running_loop().create_future()
        self._open[key] = answer
        try:
            if not endpoint.send(card.address, message):
                return ProfileAnswer(call_id=message.call_id, error="the replica takes no messages")
            await asyncio.wait((answer,), timeout=timeout_s)
            if answer.done():
                return answer.result()
            return ProfileAnswer(call_id=message.call_id, error=f"no answer within {timeout_s:g} s")
        finally:
            del self._open[key]


def _chosen(engines: Iterable[MemberCard], target: ProfileTarget) -> list[MemberCard]:
    """The engines that are meant, by name. Raises `InvalidRequest` for a name that is nobody's."""
    card_by_name = {card.address.peer_id: card for card in engines}
    if not card_by_name:
        raise NotReady("no replica is there", retry_after_s=2.0)
    unknown = [name for name in target.replicas or () if name not in card_by_name]
    if unknown:
        raise InvalidRequest(
            f"no replica is called {unknown[0][:100]!r}; there are {', '.join(sorted(card_by_name))}", param="replicas"
        )
    chosen = [
        card
        for name, card in sorted(card_by_name.items())
        if (target.replicas is None or name in target.replicas) and (target.roles is None or card.role in target.roles)
    ]
    if not chosen:
        raise InvalidRequest("no replica has such a role", param="roles")
    return chosen


def _entry(card: MemberCard, answer: ProfileAnswer) -> dict[str, Any]:
    entry: dict[str, Any] = {"replica": card.address.peer_id, "role": card.role, "node": card.node}
    if answer.files:
        entry["files"] = list(answer.files)
    if answer.error is not None:
        entry["error"] = answer.error
    return entry
