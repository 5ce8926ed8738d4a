"""Timelines of requests that another ingress served: ask all of them, and take the answer of the one that knows.

Clients do not choose their ingress, so who asks for a timeline may come to another one than who generated. Asking is
rare, ingresses are few, and an id that named its ingress would name one that a rolling update has replaced.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from atom_cluster.api.generator import FoundTimeline
from atom_cluster.errors import Overloaded
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard
from atom_cluster.messages.timing import TimelineAnswer, TimelineQuery
from atom_cluster.observability.timeline_store import TimelineStore

ANSWER_TIMEOUT_S = 2.0
MAX_ID_CHARS = 256
"""Of an id in a query; longer ones are nobody's."""
MAX_OPEN_QUERIES = 256
"""That wait for an answer: who asks for thousands of timelines a second must not keep all ingresses busy with it."""


class TimelineCalls:
    """Both sides of asking. Used from one event loop."""

    def __init__(self, store: TimelineStore) -> None:
        self._store = store
        self._ids = itertools.count()
        self._open: dict[tuple[str, int], asyncio.Future[TimelineAnswer]] = {}

    def answer(self, query: TimelineQuery) -> TimelineAnswer:
        """What this ingress knows."""
        state, text = self._store.find(query.request_id)
        return TimelineAnswer(call_id=query.call_id, state=state, text=text)

    def receive(self, source: str, answer: TimelineAnswer) -> None:
        """Take another ingress's answer."""
        future = self._open.get((source, answer.call_id))
        if future is not None and not future.done():
            future.set_result(answer)

    async def ask(self, endpoint: Endpoint, members: Iterable[MemberCard], request_id: str) -> FoundTimeline:
        """What the other ingresses among the members know. Raises `Overloaded` while too many others ask."""
        others = [card for card in members if card.kind == "ingress" and card.address != endpoint.address]
        if len(request_id) > MAX_ID_CHARS:
            return FoundTimeline(num_asked=len(others))
        if len(self._open) >= MAX_OPEN_QUERIES:
            raise Overloaded("too many timelines are being looked for")
        answers = await asyncio.gather(*(self._ask(endpoint, card, request_id) for card in others))
        texts = [answer.text for answer in answers if answer is not None and answer.state == "kept"]
        return FoundTimeline(
            text=texts[0] if texts else None,
            is_running=any(answer is not None and answer.state == "running" for answer in answers),
            num_asked=len(others),
            silent=tuple(card.address.peer_id for card, answer in zip(others, answers) if answer is None),
        )

    async def _ask(self, endpoint: Endpoint, card: MemberCard, request_id: str) -> TimelineAnswer | None:
        query = TimelineQuery(call_id=next(self._ids), request_id=request_id)
        key = (card.address.peer_id, query.call_id)
        answer: asyncio.Future[TimelineAnswer] = asyncio.get_running_loop().create_future()
        self._open[key] = answer
        try:
            if not endpoint.send(card.address, query):
                return None
            await asyncio.wait((answer,), timeout=ANSWER_TIMEOUT_S)
            return answer.result() if answer.done() else None
        finally:
            del self._open[key]
