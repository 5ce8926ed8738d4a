"""Authentication and encryption of every ZMQ socket with one secret per cluster.

All processes derive the same CURVE key pair from the secret. A server accepts a client only if the client proves, in
the CURVE handshake, that it owns that very key pair (checked through ZAP), and a client accepts a server only if it
does. Whoever lacks the secret can neither join, read, inject nor replay. Nothing here reads the secret from anywhere;
see `serving/secret.py`.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

ZAP_DOMAIN = b"atom_cluster"
MIN_SECRET_BYTES = 16
HANDSHAKE_S = 5.0
"""A connection that has not proved by then to be a member's is closed."""


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """CURVE key pair shared by all members of a cluster. `repr` shows no key material."""

    public: bytes = field(repr=False)
    private: bytes = field(repr=False)

    @classmethod
    def from_secret(cls, secret: bytes) -> ClusterKey:
        """Derive the key pair. Raises `ValueError` for a secret shorter than 16 bytes."""
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"the cluster secret has {len(secret)} bytes; at least {MIN_SECRET_BYTES} are needed")
        private = z85.encode(hashlib.blake2b(secret, digest_size=32, person=b"atom link").digest())
        return cls(public=zmq.curve_public(private), private=private)

    def configure_server(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that will bind accept members only. Its context needs an authenticator (`authenticate`)."""
        self._set_keys(socket)
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN
        socket.handshake_ivl = int(HANDSHAKE_S * 1000)

    def configure_client(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that will connect talk to members only."""
        self._set_keys(socket)
        socket.curve_serverkey = self.public

    def _set_keys(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.private

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP credentials provider: whether a client's proven public key is the cluster's."""
        return key == self.public


class Authenticator:
    """Answers ZAP questions of one ZMQ context, in a thread of its own. One per context; `close` is idempotent.

    Without it libzmq would accept any client that knows the server's public key.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey) -> None:
        self._lock = threading.Lock()
        self._thread: ThreadAuthenticator | None = ThreadAuthenticator(context)
        self._thread.start()
        self._thread.configure_curve_callback(domain=ZAP_DOMAIN.decode(), credentials_provider=key)

    def close(self) -> None:
        """Stop the thread. Close the context's servers first: unanswered handshakes would hang."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()
