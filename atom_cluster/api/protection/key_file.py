"""The file of API keys, read again now and then: a key is added or taken away without a restart.

A Kubernetes secret that is mounted is such a file; its content changes by a swapped link, so what is compared is the
content and not a time. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from atom_cluster.api.protection.keys import KeyRing, parse_keys
from atom_cluster.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
_READ_TIMEOUT_S = 2.0


class KeyFile:
    """The keys of a file, at most `poll_s` old. Used from one event loop."""

    def __init__(self, path: Path, *, poll_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads it. Raises `ConfigError` when it cannot be used: a cluster that is to be protected does not start
        without its keys."""
        self._path = path
        self._poll_s = poll_s
        self._clock = clock
        self._content = _read(path)
        self._ring = parse_keys(self._content, source=str(path))
        self._read_at_s = clock()
        self._problem = ""
        self._reading: asyncio.Task[None] | None = None
        self._thread: asyncio.Task[str] | None = None
        """Reads the file, for as long as that takes."""
        logger.info("%d API keys from %s", len(self._ring.entries), path)

    async def keys(self) -> KeyRing:
        """The keys, read again first if they are older than `poll_s`.

        A file that has gone, has become wrong or does not answer leaves them as they were, and is logged once.
        """
        if self._clock() - self._read_at_s >= self._poll_s:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_again())
            # All who come meanwhile wait for the same reading; none of them may cancel it for the others.
            await asyncio.shield(self._reading)
        return self._ring

    async def _read_again(self) -> None:
        try:
            content = await asyncio.wait_for(self._read(), _READ_TIMEOUT_S)
            if content != self._content:
                self._take(content)
            self._problem = ""
        except asyncio.TimeoutError:
            self._complain(f"{self._path}: not read within {_READ_TIMEOUT_S:g} s")
        except ConfigError as exc:
            self._complain(str(exc))
        self._read_at_s = self._clock()

    async def _read(self) -> str:
        """The file's content. Of a file that does not answer there is one thread that waits, and not one more every
        time that somebody gives up: others need these threads, too."""
        if self._thread is None:
            self._thread = asyncio.create_task(asyncio.to_thread(_read, self._path))
        await asyncio.wait((self._thread,))
        done, self._thread = self._thread, None
        return done.result()

    def _take(self, content: str) -> None:
        before = {entry.name for entry in self._ring.entries}
        self._ring = parse_keys(content, source=str(self._path))
        self._content = content
        now = {entry.name for entry in self._ring.entries}
        logger.info(
            "API keys of %s changed: %d now, new: %s, gone: %s",
            self._path,
            len(now),
            ", ".join(sorted(now - before)[:10]) or "none",
            ", ".join(sorted(before - now)[:10]) or "none",
        )

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("API keys stay as they were: %s", problem)
        self._problem = problem


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot read the API keys: {exc.strerror}") from exc
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a file of API keys has at most {MAX_FILE_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: byte {exc.start} is not UTF-8") from exc
