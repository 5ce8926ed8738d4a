"""SlowLine: a relay in front of a listener of this process, through which every byte comes late and slowly.

What a slow network does, without the rights that shaping a network interface takes, and to this cluster only. Others
are told the relay's port instead of the listener's. It knows nothing of what passes. It is a process of its own, as a
network takes no time of those who use it, and ends with the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import signal
import subprocess
import sys

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.units import MiB

_CHUNK_BYTES = 64 * 1024
_MAX_CHUNKS = 1024
"""Under way per connection and direction: a sender that is faster than the line has to wait, as with any network."""
_CLOSE_S = 5.0


class SlowLine:
    """Of one listener. `close` ends it; it is idempotent."""

    def __init__(self, *, delay_s: float, bytes_per_s: float) -> None:
        """delay_s: of each byte in each direction, at most; half of it at least. bytes_per_s: of all connections
        together in each direction."""
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._process: subprocess.Popen[bytes] | None = None

    def lead_to(self, host: str, port: int) -> int:
        """Begin, in front of a listener; the relay's port on the same host. Raises OSError when it does not start."""
        numbers = (port, self._delay_s, self._bytes_per_s)
        command = [sys.executable, "-m", __name__, host, *map(str, numbers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        if not told:
            raise OSError(f"no slow line to {host}:{port}: the relay ended with {self._process.wait()}")
        return int(told)

    def close(self) -> None:
        """Cut all its connections."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate(timeout=_CLOSE_S)


def line_of(faults: FaultsConfig) -> SlowLine | None:
    """For one listener, if there is to be one."""
    if not faults.line_delay_s and faults.line_mib_per_s is None:
        return None
    bytes_per_s = math.inf if faults.line_mib_per_s is None else faults.line_mib_per_s * MiB
    return SlowLine(delay_s=faults.line_delay_s, bytes_per_s=bytes_per_s)


# --- in the relay's process -----------------------------------------------------------------------------------------


class _Direction:
    """One direction of the line, which all connections share: when what is sent now arrives."""

    def __init__(self, *, delay_s: float, bytes_per_s: float) -> None:
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def arrival_s(self, now_s: float, num_bytes: int) -> float:
        """Behind everything that was sent before; the order between connections is not kept, as on any network."""
        self._free_at_s = max(now_s, self._free_at_s) + num_bytes / self._bytes_per_s
        return self._free_at_s + self._delay_s * random.uniform(0.5, 1.0)


class _Relay:
    """Connections to one listener."""

    def __init__(self, host: str, port: int, *, delay_s: float, bytes_per_s: float) -> None:
        self._host, self._port = host, port
        self._to = _Direction(delay_s=delay_s, bytes_per_s=bytes_per_s)
        self._fro = _Direction(delay_s=delay_s, bytes_per_s=bytes_per_s)

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        """One connection, until both of its ends or either one's failure."""
        writers = [client_out]
        try:
            target_in, target_out = await asyncio.open_connection(self._host, self._port)
            writers.append(target_out)
            await asyncio.gather(_carry(client_in, target_out, self._to), _carry(target_in, client_out, self._fro))
        except OSError:
            pass  # that one end has gone is the other end's to see
        finally:
            for writer in writers:
                writer.transport.abort()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: _Direction) -> None:
    """Everything up to the end of `source`, each part when it arrives, and then the end."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_CHUNKS)

    async def arrive() -> None:
        while True:
            at_s, data = await under_way.get()
            await asyncio.sleep(max(0.0, at_s - loop.time()))
            if not data:
                target.write_eof()
                await target.drain()
                return
            target.write(data)
            await target.drain()

    async def leave() -> None:
        data = b"more"
        while data:
            data = await source.read(_CHUNK_BYTES)
            await under_way.put((direction.arrival_s(loop.time(), len(data)), data))

    arriving = asyncio.ensure_future(arrive())
    leaving = asyncio.ensure_future(leave())
    try:
        await asyncio.gather(arriving, leaving)
    finally:
        arriving.cancel()
        leaving.cancel()


async def _run(host: str, port: int, *, delay_s: float, bytes_per_s: float) -> None:
    relay = _Relay(host, port, delay_s=delay_s, bytes_per_s=bytes_per_s)
    server = await asyncio.start_server(relay.serve, host, 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    # Nobody writes to it: it ends when the process at its other end does, however that dies.
    owner = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(owner), sys.stdin)
    await owner.read()
    server.close()


def main() -> None:
    """python -m atom_cluster.link.slow_line HOST PORT DELAY_S BYTES_PER_S; writes the port of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("delay_s", type=float)
    parser.add_argument("bytes_per_s", type=float)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its owner's, who still talks through it
    asyncio.run(_run(args.host, args.port, delay_s=args.delay_s, bytes_per_s=args.bytes_per_s))


if __name__ == "__main__":
    main()
