"""SlowLine: late, slow, and otherwise as if it were not there."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from atom_cluster.link.slow_line import SlowLine
from atom_cluster.units import MiB


class Echo:
    """Sends back what comes, and the end when it comes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):  # the line was cut
            while data := sock.recv(65536):
                sock.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def line() -> Iterator[SlowLine]:
    line = SlowLine(delay_s=0.2, bytes_per_s=4 * MiB)
    yield line
    line.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def send_all(sock: socket.socket, data: bytes) -> None:
    """And the end."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def receive_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(65536):
        parts.append(data)
    return b"".join(parts)


def test_everything_arrives_in_order_late_and_no_faster_than_the_line_is(echo: Echo, line: SlowLine) -> None:
    data = secrets.token_bytes(2 * MiB)
    with connect(line.lead_to("127.0.0.1", echo.port)) as sock:
        began_s = time.monotonic()
        threading.Thread(target=send_all, args=(sock, data), daemon=True).start()
        assert receive_all(sock) == data
        # Half of the delay at least, both ways, behind 2 MiB at 4 MiB/s.
        assert time.monotonic() - began_s > 0.2 + 0.5


def test_connections_share_the_line(echo: Echo, line: SlowLine) -> None:
    port = line.lead_to("127.0.0.1", echo.port)
    socks = [connect(port) for _ in range(4)]
    data = secrets.token_bytes(MiB // 2)
    began_s = time.monotonic()
    for sock in socks:
        threading.Thread(target=send_all, args=(sock, data), daemon=True).start()
    for sock in socks:
        assert receive_all(sock) == data
        sock.close()
    assert time.monotonic() - began_s > 4 * 0.5 / 4


def test_a_listener_that_is_gone_ends_connections(echo: Echo, line: SlowLine) -> None:
    port = line.lead_to("127.0.0.1", echo.port)
    echo.close()
    with connect(port) as sock:
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


def test_who_closes_it_cuts_its_connections(echo: Echo, line: SlowLine) -> None:
    with connect(line.lead_to("127.0.0.1", echo.port)) as sock:
        sock.sendall(b"a")
        assert sock.recv(1) == b"a"
        line.close()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        line.close()


def test_it_ends_with_the_process_that_started_it(echo: Echo) -> None:
    script = (
        "import time\n"
        "from atom_cluster.link.slow_line import SlowLine\n"
        "line = SlowLine(delay_s=0.0, bytes_per_s=1e9)\n"
        f"print(line.lead_to('127.0.0.1', {echo.port}), flush=True)\n"
        "time.sleep(100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    port = int(owner.stdout.readline())
    with connect(port) as sock:
        sock.sendall(b"a")
        assert sock.recv(1) == b"a"
        owner.kill()
        owner.communicate()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_a_terminals_interrupt_leaves_it_to_its_owner(echo: Echo, line: SlowLine) -> None:
    with connect(line.lead_to("127.0.0.1", echo.port)) as sock:
        assert line._process is not None
        line._process.send_signal(signal.SIGINT)
        for _ in range(3):
            sock.sendall(b"a")
            assert sock.recv(1) == b"a"


def test_a_line_that_cannot_start_says_so(line: SlowLine) -> None:
    with pytest.raises(OSError, match="no slow line to 192\\.0\\.2\\.1:9"):
        line.lead_to("192.0.2.1", 9)
