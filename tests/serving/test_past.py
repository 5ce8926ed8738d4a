"""An ingress that starts later knows that its application was there before, and of no other."""

from __future__ import annotations

import pytest

from atom_cluster.serving import past
from atom_cluster.serving.past import has_served, note_served


def test_what_one_process_notes_others_know_and_only_of_this_application(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[tuple[bytes, bytes], bytes] = {}

    def put(key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> None:
        values[namespace, key] = value

    def exists(key: bytes, *, namespace: bytes) -> bool:
        return (namespace, key) in values

    monkeypatch.setattr(past, "_internal_kv_put", put)
    monkeypatch.setattr(past, "_internal_kv_exists", exists)
    assert not has_served("one")
    note_served("one")
    note_served("one")
    assert has_served("one") and not has_served("other")


def test_a_control_store_that_is_away_is_tried_again_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who notes it is the loop that announces an ingress."""

    def put(key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> None:
        raise RuntimeError("the control store is away")

    monkeypatch.setattr(past, "_internal_kv_put", put)
    assert not note_served("one")
    monkeypatch.setattr(past, "_internal_kv_put", lambda *args, **kwargs: None)
    assert note_served("one")
