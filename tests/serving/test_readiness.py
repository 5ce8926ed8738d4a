"""Ready is what a generation says, asked for once however many want to know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from atom_cluster.api.generator import GenerateInput
from atom_cluster.errors import AtomClusterError, NotReady, RequestFailed
from atom_cluster.messages.requests import TokenDelta
from atom_cluster.serving import readiness
from atom_cluster.serving.readiness import ReadinessProbe


class Streams:
    """Answers every request with one token once `gate` is open, or raises `error`."""

    def __init__(self) -> None:
        self.requests: list[GenerateInput] = []
        self.num_open = 0
        self.error: AtomClusterError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, request: GenerateInput) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            yield TokenDelta(request_id=request.request_id, first_index=0, token_ids=(1,), finish_reason="length")
        finally:
            self.num_open -= 1


@pytest.fixture
def streams() -> Streams:
    return Streams()


def probe_of(streams: Streams, max_model_len: int = 4096) -> ReadinessProbe:
    return ReadinessProbe(streams, num_vocab_tokens=1000, max_model_len=max_model_len)


async def test_a_success_counts_for_a_while(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(streams)
    for _ in range(3):
        await probe.check()
    assert len(streams.requests) == 1
    monkeypatch.setattr(readiness, "VALID_S", 0.0)
    await probe.check()
    first, second = streams.requests
    assert first.request_id != second.request_id and first.token_ids != second.token_ids


async def test_whoever_asks_while_one_is_under_way_shares_its_success(streams: Streams) -> None:
    streams.gate.clear()
    probe = probe_of(streams)
    asking = [asyncio.create_task(probe.check()) for _ in range(10)]
    await asyncio.sleep(0.01)
    streams.gate.set()
    await asyncio.gather(*asking)
    assert len(streams.requests) == 1


async def test_whoever_asks_while_one_is_under_way_shares_its_failure(streams: Streams) -> None:
    streams.gate.clear()
    streams.error = RequestFailed("the engine failed")
    probe = probe_of(streams)
    asking = [asyncio.create_task(probe.check()) for _ in range(10)]
    await asyncio.sleep(0.01)
    streams.gate.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(outcome, NotReady) and "the engine failed" in str(outcome) for outcome in outcomes)
    assert len(streams.requests) == 1


async def test_a_failure_is_not_remembered(streams: Streams) -> None:
    streams.error = NotReady("nobody is there")
    probe = probe_of(streams)
    with pytest.raises(NotReady, match="nobody is there"):
        await probe.check()
    streams.error = None
    await probe.check()


async def test_a_generation_that_hangs_is_given_up_and_closed(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "TIMEOUT_S", 0.05)
    streams.gate.clear()
    with pytest.raises(NotReady, match="took longer"):
        await probe_of(streams).check()
    assert streams.num_open == 0


async def test_one_who_stops_waiting_does_not_spoil_it_for_the_others(streams: Streams) -> None:
    streams.gate.clear()
    probe = probe_of(streams)
    impatient, patient = asyncio.create_task(probe.check()), asyncio.create_task(probe.check())
    await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.sleep(0.01)
    streams.gate.set()
    await patient
    assert impatient.cancelled() and len(streams.requests) == 1


async def test_the_prompt_fits_a_short_context_and_the_vocabulary(streams: Streams) -> None:
    await probe_of(streams, max_model_len=16).check()
    (request,) = streams.requests
    assert len(request.token_ids) + (request.sampling.max_tokens or 0) <= 16
    assert all(0 <= token < 1000 for token in request.token_ids)
