"""The drill's flood against the API in a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from atom_cluster.api.generator import GenerateInput
from atom_cluster.observability.metrics import KEY_REQUESTS
from atom_cluster.tools.drill.cluster import RunningCluster
from atom_cluster.tools.drill.flood import flood
from tests.api.conftest import Api, Serve
from tests.api.fake_generator import Step


async def test_a_flood_of_an_api_that_takes_few_at_a_time(make_api: Callable[..., Api], serve: Serve) -> None:
    go = asyncio.Event()

    def script(request: GenerateInput) -> list[Step]:
        # The flood asks once before it floods.
        return [*([go] if len(api.generator.requests) > 1 else []), (1,), "stop"]

    api = make_api(script, protection={"max_open_requests": 5})
    running = RunningCluster(await serve(api.app))
    flooding = asyncio.create_task(asyncio.to_thread(flood, running, num_connections=40))
    while len(api.generator.open_ids) < 5:
        await asyncio.sleep(0.01)
    while not api.metrics.value(KEY_REQUESTS, key="anonymous", outcome="queue_full"):
        await asyncio.sleep(0.01)
    go.set()
    found = await flooding
    assert found["served"] + found["refused"] == 40
    assert found["served"] >= 5 and found["refused"] >= 1
