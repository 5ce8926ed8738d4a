"""OpenRequests: the requests of an engine's clients from their admission to their end, of which there are many kinds.

Answered, cancelled, failed, late, moved to another engine, or their client is gone: in each case what they hold comes
back, once, and whoever is to hear of it does. Prompts computed for other engines are not among them: they are tickets
(`engine.prefill_side`). Knows no steps and no messages.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from atom_cluster.engine.replies import Replies
from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.scheduler import Scheduler
from atom_cluster.errors import AtomClusterError, NotReady, RequestTimeout
from atom_cluster.kv_cache.block_manager import BlockManager


class OpenRequests:
    """See the module's docstring. All calls from the engine's thread."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        blocks: BlockManager,
        replies: Replies,
        cancel_remote: Callable[[Request], None],
    ) -> None:
        """cancel_remote: ends a request whose prompt is at prefill or on its way from there."""
        self._scheduler = scheduler
        self._blocks = blocks
        self._replies = replies
        self._cancel_remote = cancel_remote
        self._requests: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, str]] = []  # of requests that are over, too, and so not the requests

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def all(self) -> list[Request]:
        """Those there are now, whatever happens to them meanwhile."""
        return list(self._requests.values())

    def add(self, request: Request, *, deadline_s: float | None) -> None:
        """A request is admitted. deadline_s: seconds from its arrival after which it fails."""
        self._requests[request.request_id] = request
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (request.arrived_s + deadline_s, request.order, request.request_id))

    def finish(self, request: Request) -> None:
        """Its client has its last token. If that came from prefill, its ticket is the caller's to end."""
        del self._requests[request.request_id]
        if request.phase is Phase.REMOTE:
            request.end()
        else:
            self._release(request)

    def cancel(self, client: str, request_id: str) -> None:
        """A client wants no more of a request, if it is its own and there."""
        request = self._requests.get(request_id)
        if request is not None and request.client == client:
            self._abandon(request)

    def drop_client(self, client: str) -> None:
        """A client is gone."""
        for request in self.all():
            if request.client == client:
                self._abandon(request)

    def fail(self, request: Request, error: AtomClusterError) -> None:
        """It cannot go on. Others are none the worse."""
        self._abort(request)
        self._replies.error(request, error)

    def move(self, request: Request, error: NotReady) -> None:
        """It is to go on with another engine."""
        self._abort(request)
        self._replies.move(request, error)

    def expire(self, now_s: float) -> None:
        """Fail those whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, order, request_id = heapq.heappop(self._deadlines)
            late = self._requests.get(request_id)
            if late is not None and late.order == order:
                self.fail(late, RequestTimeout("the request did not finish within its deadline"))

    def tell_all(self, error: AtomClusterError) -> None:
        """The engine is about to end; what its requests hold ends with it."""
        for request in self.all():
            self._replies.error(request, error)

    def _abandon(self, request: Request) -> None:
        """Nobody is to hear of it any more."""
        self._abort(request)
        self._replies.note_end(request, "abort")

    def _abort(self, request: Request) -> None:
        """End a request, whatever it is doing."""
        del self._requests[request.request_id]
        if request.phase is Phase.REMOTE:
            self._cancel_remote(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._scheduler.remove(request)
        self._blocks.release(request.table)
