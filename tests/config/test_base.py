from __future__ import annotations

import pickle

import pytest
from pydantic import Field, ValidationError

from atom_cluster.config.base import FrozenConfig, nearest
from atom_cluster.config.cluster import ClusterConfig


class Inner(FrozenConfig):
    size: int = Field(1, ge=1)


class Outer(FrozenConfig):
    name: str
    inner: Inner = Inner()


def messages(data: object) -> dict[tuple[int | str, ...], str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    return {line["loc"]: line["msg"] for line in caught.value.errors()}


def test_an_unknown_key_is_refused_with_the_nearest_valid_one() -> None:
    assert messages({"name": "x", "innr": {}}) == {("innr",): "unknown key; did you mean `inner`?"}


def test_an_unknown_key_unlike_any_other_lists_the_valid_ones() -> None:
    assert messages({"name": "x", "zzz": 1}) == {("zzz",): "unknown key; valid keys: name, inner"}


def test_an_unknown_key_does_not_hide_other_problems() -> None:
    found = messages({"nam": "x", "inner": {"siz": 2, "size": 0}})
    assert set(found) == {("nam",), ("name",), ("inner", "siz"), ("inner", "size")}
    assert found["inner", "siz"] == "unknown key; did you mean `size`?"


def test_a_message_with_braces_survives() -> None:
    assert messages({"name": "x", "{x}": 1})[("{x}",)].startswith("unknown key")


def test_keyword_arguments_are_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="did you mean `name`"):
        Outer(nam="x")  # type: ignore[call-arg]


def test_configurations_are_frozen_and_survive_pickling() -> None:
    config = ClusterConfig.model_validate({"model": "m", "unified": {"replicas": 2}})
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert ClusterConfig.model_validate(config.model_dump()) == config


def test_nearest_knows_when_nothing_is_near() -> None:
    assert nearest("decod", ("prefill", "decode")) == "; did you mean `decode`?"
    assert nearest("xyz", ("prefill", "decode")) == "; valid keys: prefill, decode"
