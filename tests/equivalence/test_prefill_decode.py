"""Prompts computed by one engine and continued by another, KV moved between them, give what one engine gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, TokenBatch
from atom_cluster.models.registry import build_model, read_spec
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, PREFIX_CACHE_HITS
from atom_cluster.ops.select import torch_table
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.units import Deadline
from tests.equivalence.generation import FAMILIES, Request, generate, mixed_requests
from tests.models.paged_driver import make_context
from tests.tiny_models import tiny_model_dir

CLIENT = "client"
BLOCK_SIZE = 8


class Pair:
    """A prefill and a decode engine in this process, each with its own runner and KV memory."""

    def __init__(
        self,
        model_dir: Path,
        *,
        transport: str,
        num_decode_blocks: int = 128,
        max_num_batched_tokens: int = 1024,
        max_model_len: int = 256,
        num_drafts: int = 0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, str] = {}
        self.metrics = {name: MemoryMetrics() for name in ("prefill", "decode")}
        self.addresses = {name: PeerAddress(peer_id=name, endpoint="", epoch=7) for name in ("prefill", "decode")}
        self.runners: list[LocalRunner] = []
        self.cores: dict[str, EngineCore] = {}
        for name, num_blocks in (("prefill", 128), ("decode", num_decode_blocks)):
            options = RunnerOptions(
                model_dir=str(model_dir),
                dtype="float64",
                device=device,
                block_size=BLOCK_SIZE,
                num_blocks=num_blocks,
                max_num_requests=16,
                max_model_len=max_model_len,
                num_drafts=num_drafts,
                num_threads=1,
                kv_transport=transport,
                secret=b"0123456789abcdef",
            )
            runner = LocalRunner(build_model_runner(options))
            self.runners.append(runner)
            self.cores[name] = EngineCore(
                runner=runner,
                outbox=_Wire(self, name),
                scheduler=SchedulerConfig(max_num_requests=16, max_num_batched_tokens=max_num_batched_tokens),
                transfer=KvTransferConfig(min_remote_tokens=4),
                metrics=self.metrics[name],
                peer=self.addresses[name],
            )

    def generate(self, requests: list[Request], *, timeout_s: float = 20.0) -> list[list[int]]:
        """Output tokens, all requests sent to decode at once."""
        for number, (prompt, sampling) in enumerate(requests):
            message = EngineRequest(
                request_id=f"r{number}",
                token_ids=tuple(prompt),
                sampling=sampling,
                eos_token_ids=(1,),
                prefill=self.addresses["prefill"],
            )
            self.tokens[message.request_id] = []
            self.cores["decode"].put(CLIENT, message)
        self.finish_reasons.clear()
        deadline = Deadline.after(timeout_s)
        has_work = [True]
        while any(has_work) or len(self.finish_reasons) < len(requests):
            assert not deadline.has_passed, f"finished: {self.finish_reasons}"
            has_work = [core.step(wait_s=0.001) for core in self.cores.values()]
        assert set(self.finish_reasons.values()) <= {"stop", "length"}
        return [self.tokens[f"r{number}"] for number in range(len(requests))]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()


class _Wire:
    """Outbox of one engine: delivers to the other one, and collects what goes to the client."""

    def __init__(self, pair: Pair, own_name: str) -> None:
        self._pair = pair
        self._own_name = own_name

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        name = destination if isinstance(destination, str) else destination.peer_id
        if name in self._pair.cores:
            self._pair.cores[name].put(self._own_name, message)  # type: ignore[arg-type]
        elif name == CLIENT:
            assert isinstance(message, TokenBatch)
            for delta in message.deltas:
                known = self._pair.tokens[delta.request_id]
                assert delta.first_index == len(known), "a token was lost or repeated"
                known.extend(delta.token_ids)
                if delta.finish_reason is not None:
                    self._pair.finish_reasons[delta.request_id] = delta.finish_reason


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    return generate(model, mixed_requests())


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Pairs that a test made, closed after it."""
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


def assert_kv_came_from_prefill(pair: Pair, model: str, requests: list[Request]) -> None:
    """Every prompt's pages were transferred, no more of a window than its end; and nothing is held afterwards."""
    num_bytes = sum(num_bytes_needed(model, len(prompt)) for prompt, _ in requests)
    assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) == num_bytes
    for core in pair.cores.values():
        held = {state: count for state, count in core.stats().blocks_by_state.items() if count}
        assert set(held) <= {"free", "cached"}


def num_bytes_needed(model: str, num_tokens: int) -> int:
    """Size of the pages that the tokens behind a prompt need."""
    context = make_context(torch_table("test"), dtype=torch.float64)
    layout = build_model(read_spec(tiny_model_dir(model)), context, max_model_len=256).kv_layout
    num_columns = -(-num_tokens // BLOCK_SIZE)
    num_bytes = 0
    for group in layout.groups:
        num_behind = max(0, num_tokens - group.window + 1) // BLOCK_SIZE if group.window else 0
        num_pages = 1 if group.kind == "state" else num_columns - num_behind
        num_bytes += num_pages * layout.page_bytes(group, BLOCK_SIZE)
    return num_bytes


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_pair_gives_what_one_engine_gives(
    model: str, expected: list[list[int]], pairs: list[Pair], transport: str
) -> None:
    pair = Pair(tiny_model_dir(model), transport=transport)
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
    assert_kv_came_from_prefill(pair, model, mixed_requests())


def test_chunks_published_one_by_one_give_the_same(model: str, expected: list[list[int]], pairs: list[Pair]) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm", max_num_batched_tokens=20)
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected


def test_prefixes_cached_on_either_side_give_the_same(model: str, expected: list[list[int]], pairs: list[Pair]) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm")
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
    first_bytes = pair.metrics["decode"].value(KV_TRANSFER_BYTES)
    assert pair.generate(mixed_requests()) == expected
    assert pair.metrics["decode"].value(PREFIX_CACHE_HITS) > 0
    assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) < 2 * first_bytes


def test_a_decode_engine_short_of_blocks_gives_the_same(
    model: str, expected: list[list[int]], pairs: list[Pair]
) -> None:
    pair = Pair(tiny_model_dir(model), transport="shm", num_decode_blocks=16)
    pairs.append(pair)
    assert pair.generate(mixed_requests()) == expected
