"""Listening sockets of processes of this host, and what they cost a process: descriptors and memory. Linux only.

Only our own listeners are of interest. They are told by their first words: a process of Ray has others.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal

from atom_cluster.kv_transfer.tcp_wire import MAGIC
from atom_cluster.units import KiB

Kind = Literal["link", "kv over tcp"]

_LISTENING = "0A"
_FIRST_WORDS_S = 0.5
_ZMQ_SIGNATURE_BYTES = 10


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a process of ours listens."""

    pid: int
    host: str
    port: int
    kind: Kind


def listeners_of(pids: Iterable[int]) -> list[Listener]:
    """Of processes of this host that we may look into."""
    found = []
    for pid in pids:
        for host, port in _listening(pid):
            kind = _kind_of(host, port)
            if kind is not None:
                found.append(Listener(pid, host, port, kind))
    return found


def num_descriptors(pid: int) -> int:
    """Open descriptors of a process. Raises OSError when it is gone."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: neither files nor memory shared with others."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * KiB if found else 0


def _listening(pid: int) -> list[tuple[str, int]]:
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed while we looked
            inodes.add(os.readlink(descriptor))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                found.append((_address(address), int(port, 16)))
    return found


def _address(digits: str) -> str:
    """Four-byte words in the host's byte order."""
    words = [bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8)]
    if len(words) == 1:
        return socket.inet_ntoa(words[0])
    address = IPv6Address(b"".join(words))
    return "127.0.0.1" if address.is_unspecified else str(address.ipv4_mapped or address)


def _kind_of(host: str, port: int) -> Kind | None:
    try:
        with socket.create_connection((host, port), timeout=_FIRST_WORDS_S) as connection:
            words = connection.recv(_ZMQ_SIGNATURE_BYTES, socket.MSG_WAITALL)
    except OSError:
        return None
    if words.startswith(MAGIC[: len(words)]) and len(words) >= len(MAGIC):
        return "kv over tcp"
    is_zmq = len(words) == _ZMQ_SIGNATURE_BYTES and words[0] == 0xFF and words[-1] == 0x7F
    return "link" if is_zmq else None
