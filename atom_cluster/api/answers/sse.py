"""Stop 14 of 14: text becomes server-sent events, the bytes a streaming client reads. The walk ends here.

The only place that writes `data: `. News of all outputs that is there at once leaves in one write, one event per
output. Knows nothing of where the news comes from.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from atom_cluster.api.answers.outputs import ClientLeftError, RunningOutputs
from atom_cluster.api.openai.format import AnswerFormat
from atom_cluster.api.openai.wire import TypedEvent, Usage
from atom_cluster.errors import AtomClusterError

logger = logging.getLogger(__name__)

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx and its kin would otherwise collect the events.
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(payload: msgspec.Struct, *, is_typed: bool = False) -> bytes:
    """One event, named by the payload's `type` if `is_typed`."""
    name = f"event: {payload.type}\n".encode() if is_typed and isinstance(payload, TypedEvent) else b""
    return name + b"data: " + _encoder.encode(payload) + b"\n\n"


async def event_stream(
    running: RunningOutputs, words: AnswerFormat, *, usage: Callable[[], Usage]
) -> AsyncIterator[bytes]:
    """What to write, as soon as there is something.

    `usage`: counts as of now. An error before the first piece is raised, so that it becomes a status; a later one
    becomes an error event, after which the stream ends without the event that says it is complete.
    """

    def events(payloads: Iterable[msgspec.Struct]) -> bytes:
        return b"".join(event(payload, is_typed=words.is_typed) for payload in payloads)

    opened: set[int] = set()
    try:
        is_done = False
        while not is_done:
            news = await running.wait_for_news()
            is_done = running.is_done
            payloads: list[msgspec.Struct] = []
            # Counted once for all that open: each count goes through all outputs.
            so_far = usage() if any(entry.index not in opened for entry in news) else None
            for entry in news:
                if so_far is not None and entry.index not in opened:
                    payloads += words.opening(entry.index, so_far)
                    opened.add(entry.index)
                payloads += words.chunks(entry)
            if is_done:
                payloads += words.closing(usage())
            end = DONE if is_done and not words.is_typed else b""
            if payloads or end:
                yield events(payloads) + end
    except AtomClusterError as exc:
        if not opened:
            raise
        yield events([words.failure(exc)])
    except ClientLeftError:
        raise  # no failure, and nobody to tell
    except Exception as exc:
        if opened:
            logger.exception("a stream failed")
            yield events([words.failure(exc)])
        raise
