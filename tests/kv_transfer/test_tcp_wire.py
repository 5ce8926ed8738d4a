from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.errors import ProtocolError, TransferError
from atom_cluster.kv_transfer import tcp_wire as wire
from atom_cluster.kv_transfer.pieces import Extent

EXPORT = b"e" * 16
KEY = b"k" * 32


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def test_both_sides_accept_each_other_only_with_equal_secret_export_and_nonces() -> None:
    key, other = wire.WireKey(b"a" * 16), wire.WireKey(b"b" * 16)
    hello = wire.make_hello()
    wire.check_hello(hello)
    proof = key.client_proof(EXPORT, hello, wire.make_nonce())
    key.check_client_proof(EXPORT, hello, proof)
    answer = key.server_proof(EXPORT, hello, proof)
    key.check_server_proof(EXPORT, hello, proof, answer)
    assert len(hello) == wire.HELLO_BYTES
    assert len(proof) == wire.CLIENT_PROOF_BYTES
    assert len(answer) == wire.PROOF_BYTES
    for checker, export, greeting in (
        (other, EXPORT, hello),
        (key, b"f" * 16, hello),
        (key, EXPORT, wire.make_hello()),
    ):
        with pytest.raises(ProtocolError):
            checker.check_client_proof(export, greeting, proof)
        with pytest.raises(ProtocolError):
            checker.check_server_proof(export, greeting, proof, answer)
    with pytest.raises(ProtocolError):  # a client's own words sent back to it
        key.check_server_proof(EXPORT, hello, proof, proof[wire.NONCE_BYTES :])


def test_session_keys_differ_between_connections() -> None:
    key, hello = wire.WireKey(b"a" * 16), wire.make_hello()
    proofs = [key.client_proof(EXPORT, hello, wire.make_nonce()) for _ in range(2)]
    assert key.session_key(EXPORT, hello, proofs[0]) != key.session_key(EXPORT, hello, proofs[1])


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    st.integers(0, 2**40),
    st.integers(0, 9),
    st.none() | st.lists(st.builds(Extent, *[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=5).map(tuple),
    st.integers(0, 10_000),
)
def test_requests_round_trip_and_any_flipped_bit_is_noticed(
    block_ids: list[int], sequence: int, group: int, extents: tuple[Extent, ...] | None, bit: int
) -> None:
    def decode(data: bytes) -> tuple[int, tuple[int, ...], tuple[Extent, ...] | None]:
        header, body = data[: wire.REQUEST_HEADER_BYTES], data[wire.REQUEST_HEADER_BYTES :]
        if wire.request_body_bytes(header, sequence) != len(body):
            raise ProtocolError("another length")
        return wire.decode_request(KEY, header, body)

    data = wire.encode_request(KEY, sequence, group, block_ids, extents)
    assert decode(data) == (group, tuple(block_ids), extents)
    with pytest.raises(ProtocolError):
        decode(flipped(data, bit))


@given(st.integers(0, 10_000))
def test_any_flipped_bit_of_a_response_is_noticed(bit: int) -> None:
    data = wire.encode_response(KEY, 5, wire.STATUS_OK, 100)
    assert wire.decode_response(KEY, data, 5, 100) == wire.STATUS_OK
    with pytest.raises(ProtocolError):
        wire.decode_response(KEY, flipped(data, bit), 5, 100)


def test_responses_out_of_order_or_of_another_length_are_refused() -> None:
    data = wire.encode_response(KEY, 5, wire.STATUS_OK, 100)
    for sequence, num_bytes in ((4, 100), (5, 99)):
        with pytest.raises(ProtocolError):
            wire.decode_response(KEY, data, sequence, num_bytes)
    with pytest.raises(ProtocolError):
        wire.decode_response(KEY, wire.encode_response(KEY, 5, wire.STATUS_BAD_BLOCKS, 100), 5, 100)


@pytest.mark.parametrize(
    ("num_blocks", "num_extents"), [(0, 0), (wire.MAX_REQUEST_BLOCKS + 1, 0), (1, wire.MAX_REQUEST_EXTENTS + 1)]
)
def test_requests_without_blocks_or_with_too_many_are_refused(num_blocks: int, num_extents: int) -> None:
    data = wire.encode_request(KEY, 0, 0, [0] * num_blocks, [Extent(0, 8)] * num_extents)
    with pytest.raises(ProtocolError, match="blocks"):
        wire.request_body_bytes(data[: wire.REQUEST_HEADER_BYTES], 0)


def test_short_secrets_are_refused() -> None:
    with pytest.raises(TransferError, match="at least 16"):
        wire.WireKey(b"x" * 15)
