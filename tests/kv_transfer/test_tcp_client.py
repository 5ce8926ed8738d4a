"""What a server that misbehaves can do to the reader: fail its reads, no more."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from atom_cluster.kv_transfer import tcp_client
from atom_cluster.kv_transfer import tcp_wire as wire
from atom_cluster.kv_transfer.protocol import ReadCompletion
from atom_cluster.kv_transfer.tcp_client import BlockReader, ReadOrder, ServerAddress
from atom_cluster.units import Deadline
from tests.kv_transfer.ranks import SECRET, make_regions, wait_until

KEY = wire.WireKey(SECRET)
EXPORT = b"x" * 16
BLOCK_BYTES = 4096


class FakeServer:
    """One connection at a time, driven by the test."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.address = ServerAddress("127.0.0.1", self._listener.getsockname()[1], EXPORT)
        self.sock: socket.socket | None = None
        self.key = b""

    def accept(self, key: wire.WireKey = KEY, hello: bytes | None = None) -> socket.socket:
        self.sock, _ = self._listener.accept()
        self.sock.settimeout(10)
        hello = hello or wire.make_hello()
        self.sock.sendall(hello)
        proof = self.receive(wire.CLIENT_PROOF_BYTES)
        self.sock.sendall(key.server_proof(EXPORT, hello, proof))
        self.key = key.session_key(EXPORT, hello, proof)
        return self.sock

    def receive(self, num_bytes: int) -> bytes:
        assert self.sock is not None
        data = b""
        while len(data) < num_bytes and (part := self.sock.recv(num_bytes - len(data))):
            data += part
        return data

    def receive_request(self, sequence: int = 0) -> tuple[int, ...]:
        header = self.receive(wire.REQUEST_HEADER_BYTES)
        body = self.receive(wire.request_body_bytes(header, sequence))
        group, block_ids, extents = wire.decode_request(self.key, header, body)
        assert (group, extents) == (0, None)
        return block_ids

    def close(self) -> None:
        self._listener.close()
        if self.sock is not None:
            self.sock.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


@pytest.fixture
def reader() -> Iterator[BlockReader]:
    made = BlockReader(key=KEY, regions=REGIONS)
    yield made
    made.close()
    REGIONS[0].blocks.zero_()


REGIONS = make_regions(num_blocks=8, block_bytes=(BLOCK_BYTES,), seed=None)


def start(reader: BlockReader, read_id: int, blocks: tuple[int, ...], deadline_s: float = 20) -> None:
    reader.start(ReadOrder(read_id, "peer", 0, blocks, blocks, Deadline.after(deadline_s), BLOCK_BYTES))


def finish(reader: BlockReader) -> ReadCompletion:
    found: list[ReadCompletion] = []

    def has_ended() -> bool:
        found.extend(reader.poll())
        return bool(found)

    wait_until(has_ended)
    (completion,) = found
    return completion


def test_the_rest_of_a_block_is_not_written_after_the_deadline_passed(server: FakeServer, reader: BlockReader) -> None:
    reader.connect("peer", server.address)
    sock = server.accept()
    start(reader, 1, (2,), deadline_s=0.3)
    assert server.receive_request() == (2,)
    sock.sendall(wire.encode_response(server.key, 0, wire.STATUS_OK, BLOCK_BYTES) + b"a" * 1000)
    completion = finish(reader)
    assert "deadline" in str(completion.error)
    start(reader, 2, (5,))
    assert server.receive_request(1) == (5,)
    sock.sendall(b"b" * (BLOCK_BYTES - 1000))
    sock.sendall(wire.encode_response(server.key, 1, wire.STATUS_OK, BLOCK_BYTES) + b"c" * BLOCK_BYTES)
    completion = finish(reader)
    assert (completion.read_id, completion.error, completion.num_bytes) == (2, None, BLOCK_BYTES)
    assert REGIONS[0].blocks[2].numpy().tobytes() == b"a" * 1000 + bytes(BLOCK_BYTES - 1000)
    assert REGIONS[0].blocks[5].numpy().tobytes() == b"c" * BLOCK_BYTES


@pytest.mark.parametrize(
    "answer",
    [
        lambda key: wire.encode_response(b"forged", 0, wire.STATUS_OK, BLOCK_BYTES),
        lambda key: wire.encode_response(key, 1, wire.STATUS_OK, BLOCK_BYTES),
        lambda key: wire.encode_response(key, 0, wire.STATUS_OK, BLOCK_BYTES - 1),
        lambda key: wire.encode_response(key, 0, wire.STATUS_BAD_BLOCKS, 0),
        lambda key: bytes(100),
    ],
    ids=["forged", "out of order", "another length", "refused", "zeros"],
)
def test_a_wrong_answer_fails_the_read_and_writes_nothing(
    server: FakeServer, reader: BlockReader, answer: Callable[[bytes], bytes]
) -> None:
    reader.connect("peer", server.address)
    sock = server.accept()
    start(reader, 1, (2,))
    server.receive_request()
    sock.sendall(answer(server.key) + b"z" * 50)
    assert finish(reader).error is not None
    assert not REGIONS[0].blocks.any()


def test_a_server_that_goes_away_fails_the_read_and_the_next_read_connects_anew(
    server: FakeServer, reader: BlockReader
) -> None:
    reader.connect("peer", server.address)
    sock = server.accept()
    start(reader, 1, (2,))
    server.receive_request()
    sock.close()
    assert finish(reader).error is not None
    start(reader, 2, (3,))
    sock = server.accept()
    assert server.receive_request() == (3,)
    sock.sendall(wire.encode_response(server.key, 0, wire.STATUS_OK, BLOCK_BYTES) + b"d" * BLOCK_BYTES)
    assert finish(reader).error is None


def test_a_server_without_the_secret_or_of_another_kind_is_not_read_from(
    server: FakeServer, reader: BlockReader
) -> None:
    reader.connect("peer", server.address)
    start(reader, 1, (2,))
    server.accept(key=wire.WireKey(b"another secret of 16"))
    assert "does not know the secret" in str(finish(reader).error)
    start(reader, 2, (2,))
    server.accept(hello=b"220 mail.example.org ESMTP ready".ljust(wire.HELLO_BYTES))
    assert "not a KV transfer server" in str(finish(reader).error)


def test_a_stuck_connection_is_given_up_with_its_reads(
    server: FakeServer, reader: BlockReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_client, "_STUCK_S", 0.0)
    reader.connect("peer", server.address)
    sock = server.accept()
    start(reader, 1, (2,), deadline_s=0.2)
    server.receive_request()
    assert "deadline" in str(finish(reader).error)
    assert sock.recv(1) == b""


def test_nobody_listening_is_an_error_at_once(reader: BlockReader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reader.connect("peer", ServerAddress("127.0.0.1", port, EXPORT))
    start(reader, 1, (2,), deadline_s=30)
    assert "no connection to the peer" in str(finish(reader).error)
