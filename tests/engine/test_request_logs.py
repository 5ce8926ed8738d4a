"""Lines about a request carry its client's id and the engines' id, on decode and on prefill."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.messages.transfer import KvPublication, PrefillOrder
from tests.engine.split import CLIENT, make_split
from tests.factories import make_message


def lines(caplog: pytest.LogCaptureFixture, module: str) -> list[tuple[str, dict[str, Any]]]:
    name = f"atom_cluster.engine.{module}"
    return [(record.getMessage(), record.__dict__["atom_fields"]) for record in caplog.records if record.name == name]


@pytest.mark.parametrize("is_lost", [False, True])
def test_both_engines_name_the_clients_request(caplog: pytest.LogCaptureFixture, is_lost: bool) -> None:
    split = make_split()
    if is_lost:

        def lose(source: str, target: str, message: EngineOutput) -> EngineOutput | None:
            return None if isinstance(message, KvPublication) else message

        split.network.alter = lose
    message = make_message("cmpl-1-0", 30, 4, prefill=split.prefill_address)
    with caplog.at_level(logging.DEBUG, "atom_cluster"):
        split.decode.put(CLIENT, msgspec.structs.replace(message, client_request_id="mine"))
        split.network.settle()
    ids = {"request_id": "mine", "id": "cmpl-1-0"}
    (order,) = split.network.messages(PrefillOrder)
    assert isinstance(order, PrefillOrder) and order.client_request_id == "mine"
    assert lines(caplog, "prefill_side") == [("30 tokens ordered by decode", ids)]
    assert lines(caplog, "replies") == [("ended with 4 tokens: length", ids)]
    assert [fields for _, fields in lines(caplog, "decode_side")] == [ids] * is_lost


def test_a_request_without_a_clients_id_goes_by_its_own(caplog: pytest.LogCaptureFixture) -> None:
    split = make_split()
    with caplog.at_level(logging.DEBUG, "atom_cluster"):
        split.send("r", 30, 4)
        split.network.settle()
    assert {fields["request_id"] for _, fields in lines(caplog, "replies")} == {"r"}


def test_quiet_logs_cost_no_words(caplog: pytest.LogCaptureFixture) -> None:
    split = make_split()
    with caplog.at_level(logging.INFO, "atom_cluster"):
        split.send("r", 30, 4)
        split.network.settle()
    assert not lines(caplog, "replies") and not lines(caplog, "prefill_side")
