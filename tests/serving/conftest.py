"""What the serving layer's own tests share: a model's config.json, and a router's handle without Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress
from atom_cluster.observability.logging import ROOT_LOGGER

ROUTER = PeerAddress(peer_id="router", endpoint="tcp://127.0.0.1:1", epoch=1)


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    """Processes of Serve set up logs when they start; here that is a test's process."""
    log = logging.getLogger(ROOT_LOGGER)
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


async def eventually(condition: Callable[[], bool]) -> None:
    """Return when the condition has come true."""
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that holds the facts about a model and nothing else of it."""
    facts = {
        "dtype": "bfloat16",
        "max_position_embeddings": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(facts))
    return directory


class RemoteMethod:
    """`handle.method`: `remote` gives something to await, made by `answer`."""

    def __init__(self, answer: Callable[[object], object]) -> None:
        self._answer = answer

    def remote(self, argument: object) -> asyncio.Future[object]:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        result = self._answer(argument)
        if isinstance(result, BaseException):
            future.set_exception(result)
        elif result is not None:
            future.set_result(result)
        return future


class FakeRouterHandle:
    """A deployment handle of a router that records its calls. `answer` is what it says: None for nothing, ever."""

    def __init__(self) -> None:
        self.cards: list[MemberCard] = []
        self.withdrawn: list[PeerAddress] = []
        self.answer: object = Membership(router=ROUTER, members=())
        self.announce = RemoteMethod(self._announce)
        self.withdraw = RemoteMethod(self._withdraw)

    def _announce(self, card: object) -> object:
        assert isinstance(card, MemberCard)
        self.cards.append(card)
        return self.answer

    def _withdraw(self, address: object) -> object:
        assert isinstance(address, PeerAddress)
        self.withdrawn.append(address)
        return self.answer


@pytest.fixture
def router_handle() -> FakeRouterHandle:
    return FakeRouterHandle()


def engine_card(peer_id: str = "engine") -> MemberCard:
    """An engine's card."""
    address = PeerAddress(peer_id=peer_id, endpoint="tcp://127.0.0.1:2", epoch=7)
    return MemberCard(address=address, kind="engine", role="unified", fingerprint="f", num_blocks=9, block_size=4)
