"""One secret for the cluster: the configured one, or the first that anybody made up."""

from __future__ import annotations

import pytest

from atom_cluster.serving import secret
from atom_cluster.serving.secret import cluster_secret


class Store:
    """Ray's control store."""

    def __init__(self) -> None:
        self.values: dict[tuple[bytes, bytes], bytes] = {}

    def put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> None:
        if overwrite or (namespace, key) not in self.values:
            self.values[namespace, key] = value

    def get(self, key: bytes, *, namespace: bytes) -> bytes | None:
        return self.values.get((namespace, key))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(secret, "_internal_kv_put", store.put)
    monkeypatch.setattr(secret, "_internal_kv_get", store.get)
    for name in ("ATOM_CLUSTER_SECRET", "ATOM_CLUSTER_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    return store


def test_a_made_up_secret_is_the_same_for_everybody_and_another_in_another_cluster(store: Store) -> None:
    first = cluster_secret()
    assert len(first) >= 32 and cluster_secret() == first
    store.values.clear()
    assert cluster_secret() != first


def test_a_configured_secret_is_used_and_stored_nowhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_CLUSTER_SECRET", "sixteen bytes or more")
    assert cluster_secret() == b"sixteen bytes or more"
    assert store.values == {}


def test_a_store_that_keeps_nothing_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "_internal_kv_get", lambda key, namespace: None)
    with pytest.raises(RuntimeError, match="did not keep"):
        cluster_secret()
