from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from atom_cluster.errors import GangError
from atom_cluster.gang.join import connect, listen


def test_followers_on_this_node_and_on_others_get_the_same_frames() -> None:
    node_by_rank = {1: "here", 2: "there", 3: "there"}
    sender, addresses = listen(node="here", host="127.0.0.1", node_by_rank=node_by_rank, send_timeout_s=10.0)
    assert addresses.describe() == "shared memory and zmq"
    with ThreadPoolExecutor(3) as pool:
        joining = [
            pool.submit(connect, addresses, rank=rank, node=node, timeout_s=10.0) for rank, node in node_by_rank.items()
        ]
        sender.accept(10.0)
        receivers = [each.result() for each in joining]
    sender.send(b"plan")
    assert [receiver.receive(10.0) for receiver in receivers] == [b"plan"] * 3
    for receiver in receivers:
        receiver.close()
    sender.close()


def test_a_follower_that_turns_up_on_another_node_than_announced_is_refused() -> None:
    sender, addresses = listen(node="here", host="127.0.0.1", node_by_rank={1: "here"}, send_timeout_s=10.0)
    assert addresses.describe() == "shared memory"
    with pytest.raises(GangError, match="rank 1 on node there was not expected"):
        connect(addresses, rank=1, node="there", timeout_s=1.0)
    sender.close()
