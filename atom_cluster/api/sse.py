"""Stop 14 of 14: text becomes server-sent events, the bytes a streaming client reads. The walk ends here.

The only place that writes `data: `. News of all outputs that is there at once leaves in one write, one event per
output. Knows nothing of where the news comes from.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import msgspec

from atom_cluster.api.error_responses import error_body
from atom_cluster.api.formats import AnswerFormat
from atom_cluster.api.outputs import ClientLeftError, RunningOutputs
from atom_cluster.api.wire import Usage
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


def event(payload: msgspec.Struct) -> bytes:
    """One event."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


async def event_stream(
    running: RunningOutputs, words: AnswerFormat, *, usage: Callable[[], Usage] | None
) -> AsyncIterator[bytes]:
    """What to write, as soon as there is something; the last piece contains `[DONE]`.

    `usage`: counts at the end, if the client asked for them. An error before the first piece is raised, so that it
    becomes a status; a later one becomes an error event, after which the stream ends without `[DONE]`.
    """
    opened: set[int] = set()
    try:
        is_done = False
        while not is_done:
            news = await running.wait_for_news()
            is_done = running.is_done
            payloads: list[msgspec.Struct] = []
            for entry in news:
                if entry.index not in opened:
                    payloads += words.opening(entry.index)
                    opened.add(entry.index)
                payloads += words.chunks(entry)
            if is_done and usage is not None:
                payloads.append(words.usage_chunk(usage()))
            yield b"".join(map(event, payloads)) + (DONE if is_done else b"")
    except AtomClusterError as exc:
        if not opened:
            raise
        yield event(error_body(exc))
    except ClientLeftError:
        raise  # no failure, and nobody to tell
    except Exception as exc:
        if opened:
            logger.exception("a stream failed")
            yield event(error_body(exc))
        raise
