"""What clients that are not ours can do to the server: nothing."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import tcp_server
from atom_cluster.kv_transfer import tcp_wire as wire
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.tcp_channel import Channel
from atom_cluster.kv_transfer.tcp_server import BlockServer
from tests.kv_transfer.ranks import SECRET, make_regions, wait_until

REGIONS = make_regions(num_blocks=8, block_bytes=(64, 200, 4096), seed=1)
GROUP, BLOCK_BYTES = 2, 4096
KEY = wire.WireKey(SECRET)


@pytest.fixture
def server() -> Iterator[BlockServer]:
    made = BlockServer(host="127.0.0.1", key=KEY, regions=REGIONS)
    yield made
    made.check_alive()
    made.close()


def receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (part := sock.recv(num_bytes - len(data))):
        data += part
    return data


def stranger(server: BlockServer) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    receive(sock, wire.HELLO_BYTES)
    return sock


def member(server: BlockServer) -> tuple[socket.socket, bytes]:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    hello = receive(sock, wire.HELLO_BYTES)
    proof = KEY.client_proof(server.export_id, hello, wire.make_nonce())
    sock.sendall(proof)
    KEY.check_server_proof(server.export_id, hello, proof, receive(sock, wire.PROOF_BYTES))
    return sock, KEY.session_key(server.export_id, hello, proof)


def is_cut_off(sock: socket.socket) -> bool:
    """Whether the server closes the connection without another byte."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    finally:
        sock.close()


def assert_serves(server: BlockServer) -> None:
    sock, key = member(server)
    with sock:
        sock.sendall(wire.encode_request(key, 0, GROUP, [3, 4]))
        header = receive(sock, wire.RESPONSE_HEADER_BYTES)
        assert wire.decode_response(key, header, 0, 2 * BLOCK_BYTES) == wire.STATUS_OK
        assert receive(sock, 2 * BLOCK_BYTES) == REGIONS[GROUP].blocks[[3, 4]].numpy().tobytes()


def test_noise_from_strangers_is_cut_off_and_hurts_nobody(server: BlockServer) -> None:
    noise = random.Random(3)
    for _ in range(100):
        sock = stranger(server)
        sock.sendall(noise.randbytes(noise.randrange(wire.CLIENT_PROOF_BYTES, 500)))
        assert is_cut_off(sock)
    assert_serves(server)


def test_a_client_without_the_secret_learns_nothing(server: BlockServer) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    hello = receive(sock, wire.HELLO_BYTES)
    sock.sendall(wire.WireKey(b"another secret of 16").client_proof(server.export_id, hello, wire.make_nonce()))
    assert is_cut_off(sock)


def test_a_proof_cannot_be_used_again(server: BlockServer) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    hello = receive(sock, wire.HELLO_BYTES)
    proof = KEY.client_proof(server.export_id, hello, wire.make_nonce())
    sock.sendall(proof)
    assert len(receive(sock, wire.PROOF_BYTES)) == wire.PROOF_BYTES
    sock.close()
    again = stranger(server)
    again.sendall(proof)
    assert is_cut_off(again)


def test_malformed_requests_of_members_are_cut_off_and_hurt_nobody(server: BlockServer) -> None:
    noise = random.Random(4)
    sock, key = member(server)
    sock.close()
    for attempt in range(60):
        sock, key = member(server)
        frame = bytearray(wire.encode_request(key, 0, GROUP, [1, 2, 3]))
        frame[attempt % len(frame)] ^= 1 << noise.randrange(8)
        sock.sendall(bytes(frame) + bytes(4 * wire.MAX_REQUEST_BLOCKS + 16 * wire.MAX_REQUEST_EXTENTS))
        assert is_cut_off(sock)
    assert_serves(server)


def test_a_request_cannot_be_sent_twice_nor_on_another_connection(server: BlockServer) -> None:
    sock, key = member(server)
    request = wire.encode_request(key, 0, GROUP, [1])
    sock.sendall(request)
    receive(sock, wire.RESPONSE_HEADER_BYTES + BLOCK_BYTES)
    sock.sendall(request)
    assert is_cut_off(sock)
    other, _ = member(server)
    other.sendall(request)
    assert is_cut_off(other)


@pytest.mark.parametrize(("group", "block"), [(GROUP, 8), (3, 0)])
def test_what_is_not_there_is_refused_and_the_connection_goes_on(server: BlockServer, group: int, block: int) -> None:
    sock, key = member(server)
    with sock:
        sock.sendall(wire.encode_request(key, 0, group, [block]) + wire.encode_request(key, 1, GROUP, [7]))
        refusal = receive(sock, wire.RESPONSE_HEADER_BYTES)
        assert wire.decode_response(key, refusal, 0, BLOCK_BYTES) == wire.STATUS_BAD_BLOCKS
        answer = receive(sock, wire.RESPONSE_HEADER_BYTES)
        assert wire.decode_response(key, answer, 1, BLOCK_BYTES) == wire.STATUS_OK


@pytest.mark.parametrize(
    "extent",
    [
        Extent(BLOCK_BYTES, 1),
        Extent(0, BLOCK_BYTES + 1),
        Extent(8, 8, 3, BLOCK_BYTES // 2),
        Extent(0, 16, 2, 8),
        Extent(0, 8, 0, 8),
        Extent(0, 0),
    ],
    ids=["behind", "too long", "last run outside", "overlapping runs", "no runs", "no bytes"],
)
def test_parts_that_are_not_within_a_block_are_refused(server: BlockServer, extent: Extent) -> None:
    sock, key = member(server)
    with sock:
        sock.sendall(wire.encode_request(key, 0, GROUP, [3], [Extent(0, 8), extent]))
        refusal = receive(sock, wire.RESPONSE_HEADER_BYTES)
        assert wire.decode_response(key, refusal, 0, 0) == wire.STATUS_BAD_BLOCKS


def test_parts_of_blocks_come_one_after_the_other(server: BlockServer) -> None:
    sock, key = member(server)
    with sock:
        sock.sendall(wire.encode_request(key, 0, GROUP, [3, 6], [Extent(100, 4, 3, 10), Extent(7, 2)]))
        header = receive(sock, wire.RESPONSE_HEADER_BYTES)
        assert wire.decode_response(key, header, 0, 2 * 14) == wire.STATUS_OK
        blocks = [REGIONS[GROUP].blocks[block].numpy().tobytes() for block in (3, 6)]
        expected = b"".join(b[100:104] + b[110:114] + b[120:124] + b[7:9] for b in blocks)
        assert receive(sock, 2 * 14) == expected


def test_strangers_that_prove_nothing_in_time_are_cut_off(server: BlockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "_HANDSHAKE_S", 0.1)
    assert is_cut_off(stranger(server))


def test_strangers_make_room_for_each_other_and_members_come_and_go(
    server: BlockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "_MAX_STRANGERS", 3)
    first, *others = [stranger(server) for _ in range(3)]
    for _ in range(10):
        assert_serves(server)
    assert is_cut_off(first), "the one that stood there longest"
    for sock in others:
        sock.close()


def test_who_is_refused_is_told_in_a_few_lines_however_many_there_are(
    server: BlockServer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        sock = stranger(server)
        sock.sendall(bytes(wire.CLIENT_PROOF_BYTES))
        assert is_cut_off(sock)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "127.0.0.1" in line and "wrong secret" in line


def test_a_member_that_takes_nothing_is_cut_off(server: BlockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "_STALLED_S", 0.2)
    sock, key = member(server)
    with sock:
        num_bytes = wire.MAX_REQUEST_BLOCKS * BLOCK_BYTES  # more than all the buffers between us
        sock.sendall(wire.encode_request(key, 0, GROUP, [1] * wire.MAX_REQUEST_BLOCKS))
        wait_until(lambda: not server._clients)
        assert len(receive(sock, num_bytes)) < num_bytes


def test_no_request_is_looked_at_before_the_answer_to_the_last_one_is_out(server: BlockServer) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        request = wire.encode_request(b"key", 0, GROUP, [1, 2])
        session = server._answer(Channel(ours, is_connecting=True), b"key", 0)
        for part in (request[: wire.REQUEST_HEADER_BYTES], request[wire.REQUEST_HEADER_BYTES :]):
            view = next(session)
            assert view is not None
            view[:] = part
        assert next(session) is None


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_listening_on_all_interfaces_is_refused(host: str) -> None:
    with pytest.raises(TransferError, match="address of this node"):
        BlockServer(host=host, key=KEY, regions=REGIONS)


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(TransferError, match="cannot listen"):
        BlockServer(host="192.0.2.1", key=KEY, regions=REGIONS)
