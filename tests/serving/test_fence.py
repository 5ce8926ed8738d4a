"""Which silent ingresses are ended."""

from __future__ import annotations

import pytest

from atom_cluster.messages.cluster import MemberCard, PeerAddress
from atom_cluster.serving.fence import Fence


def ingress(name: str, *, actor: str | None = None) -> MemberCard:
    address = PeerAddress(peer_id=name, endpoint="", epoch=1)
    return MemberCard(address=address, kind="ingress", actor=f"actor of {name}" if actor is None else actor)


class Scene:
    """A fence of 10 s that is looked at once a second."""

    def __init__(self, num_ingresses: int = 1) -> None:
        self.ended: list[str] = []
        self.fence = Fence(num_ingresses=num_ingresses, silence_s=10.0, end=self.ended.append)
        self.now_s = 100.0

    def pass_time(self, seconds: int, *talking: MemberCard) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            for card in talking:
                self.fence.heard(card, self.now_s)
            self.fence.look(self.now_s)


def test_an_ingress_that_is_silent_is_ended_once_when_another_is_in_its_place() -> None:
    scene = Scene()
    scene.pass_time(3, ingress("old"))
    scene.pass_time(5, ingress("new"))
    assert scene.ended == []
    scene.pass_time(30, ingress("new"))
    assert scene.ended == ["actor of old"]


def test_the_only_ingress_is_never_ended() -> None:
    scene = Scene()
    scene.pass_time(3, ingress("only"))
    scene.pass_time(100)
    assert scene.ended == []


@pytest.mark.parametrize(("num_others", "is_ended"), [(1, False), (2, True)])
def test_one_of_two_is_ended_when_two_others_are_there(num_others: int, is_ended: bool) -> None:
    scene = Scene(num_ingresses=2)
    others = [ingress(f"other {number}") for number in range(num_others)]
    scene.pass_time(3, ingress("old"), *others)
    scene.pass_time(30, *others)
    assert bool(scene.ended) is is_ended


def test_one_that_was_silent_for_a_while_is_not_ended() -> None:
    scene = Scene()
    scene.pass_time(3, ingress("slow"), ingress("new"))
    for _ in range(5):
        scene.pass_time(8, ingress("new"))
        scene.pass_time(1, ingress("slow"), ingress("new"))
    assert scene.ended == []


def test_engines_and_those_without_an_actor_are_left_alone() -> None:
    scene = Scene()
    address = PeerAddress(peer_id="engine", endpoint="", epoch=1)
    scene.pass_time(3, MemberCard(address=address, kind="engine", actor="engine"), ingress("no actor", actor=""))
    scene.pass_time(30, ingress("new"))
    assert scene.ended == []
