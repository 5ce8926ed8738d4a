"""TimelineStore: the timelines of the latest requests of one ingress, as JSON. Knows nothing of who asks."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from atom_cluster.messages.timing import TimelineState
from atom_cluster.observability.timeline import RequestRecord, Timeline

_encoder = msgspec.json.Encoder()


class TimelineStore:
    """Keeps the last `max_timelines`. A timeline is found by the id of its answer, and by the request id, of which the
    latest with that id counts. Used from one thread.

    Memory: some 2 KB for an output that ran undisturbed, some 60 KB for the largest request there can be.
    """

    def __init__(self, max_timelines: int) -> None:
        self.max_timelines = max_timelines
        self._text_by_id: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._id_by_request_id: dict[str, str] = {}
        self._open: dict[str, str] = {}
        """Requests that run: answer id -> request id."""

    def begin(self, record: RequestRecord) -> None:
        """A request has begun to generate."""
        self._open[record.answer_id] = record.request_id

    def end(self, timeline: Timeline) -> None:
        """A request that had begun has ended."""
        self._open.pop(timeline.id, None)
        if not self.max_timelines:
            return
        while len(self._text_by_id) >= self.max_timelines:
            old_id, (old_request_id, _) = self._text_by_id.popitem(last=False)
            if self._id_by_request_id.get(old_request_id) == old_id:
                del self._id_by_request_id[old_request_id]
        self._text_by_id[timeline.id] = (timeline.request_id, _encoder.encode(timeline))
        self._id_by_request_id[timeline.request_id] = timeline.id

    def find(self, wanted_id: str) -> tuple[TimelineState, bytes]:
        """The timeline with this id, as JSON, or why there is none."""
        answer_id = wanted_id if wanted_id in self._text_by_id else self._id_by_request_id.get(wanted_id, "")
        found = self._text_by_id.get(answer_id)
        if found is not None:
            return "kept", found[1]
        is_open = wanted_id in self._open or wanted_id in self._open.values()
        return ("running" if is_open else "unknown"), b""
