"""A request that goes on with another engine behind any number of its tokens gives what one engine gives.

Tokens come from a second engine whose cache is cold, which computes those of the first as a prompt. Log probabilities
of its tokens are those of the undisturbed run up to the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, SamplingParams, TokenBatch, TokenLogprobs
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, SPEC_DRAFT_TOKENS
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.units import Deadline
from tests.draft_models import NUM_DRAFT_LAYERS, draft_model_dir
from tests.equivalence.generation import FAMILIES, Request, mixed_requests
from tests.equivalence.pairs import CLIENT, Pair
from tests.fakes import ListOutbox
from tests.tiny_models import random_tokens, tiny_model_dir

ALL_PENALTIES = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.7,
    frequency_penalty=0.3,
    min_tokens=16,
    seed=8,
    max_tokens=20,
)
"""Without `ignore_eos`: the end of sequence is barred for 16 tokens, emitted ones included."""
CUTS = (1, 9)


def requests() -> list[Request]:
    pairs = [*mixed_requests(), (random_tokens(21, seed=40), ALL_PENALTIES)]
    return [(prompt, msgspec.structs.replace(sampling, logprobs=3)) for prompt, sampling in pairs]


@dataclass(frozen=True, slots=True)
class Output:
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    """Of the last ones: those that the engine has sent."""
    finish_reason: str


def run(
    directory: Path, emitted: list[list[int]], *, num_drafts: int = 0, wanted: list[Request] | None = None
) -> tuple[list[Output], MemoryMetrics]:
    """Outputs of these requests, or of all, from an engine that begins behind what was emitted of each."""
    options = RunnerOptions(
        model_dir=str(directory),
        dtype="float64",
        device="cpu",
        block_size=8,
        num_blocks=128,
        max_num_requests=16,
        max_model_len=112,
        num_drafts=num_drafts,
        num_threads=1,
    )
    outbox, metrics, runner = ListOutbox(), MemoryMetrics(), LocalRunner(build_model_runner(options))
    try:
        core = EngineCore(
            runner=runner,
            outbox=outbox,
            scheduler=SchedulerConfig(max_num_requests=16, max_num_batched_tokens=64),
            transfer=KvTransferConfig(),
            metrics=metrics,
            peer=PeerAddress(peer_id="engine", endpoint="", epoch=1),
        )
        for number, ((prompt, sampling), tokens) in enumerate(zip(wanted or requests(), emitted, strict=True)):
            core.put(CLIENT, make_message(number, prompt, sampling, tokens))
        deadline = Deadline.after(60.0)
        while core.step():
            assert not deadline.has_passed
    finally:
        runner.close()
    return [gather(outbox, f"r{number}", tokens) for number, tokens in enumerate(emitted)], metrics


def make_message(
    number: int, prompt: list[int], sampling: SamplingParams, emitted: list[int], prefill: PeerAddress | None = None
) -> EngineRequest:
    return EngineRequest(
        request_id=f"r{number}",
        token_ids=tuple(prompt),
        emitted=tuple(emitted),
        sampling=sampling,
        eos_token_ids=(1,),
        prefill=prefill,
    )


def gather(outbox: ListOutbox, request_id: str, emitted: list[int]) -> Output:
    token_ids, logprobs, reason = list(emitted), [], ""
    for _, message in outbox.sent:
        for delta in message.deltas if isinstance(message, TokenBatch) else ():
            if delta.request_id == request_id:
                assert delta.first_index == len(token_ids), "a token was lost or doubled"
                token_ids.extend(delta.token_ids)
                logprobs.extend(delta.logprobs or ())
                reason = delta.finish_reason or reason
    return Output(token_ids, logprobs, reason)


def assert_goes_on(directory: Path, undisturbed: list[Output], cut: int, *, num_drafts: int = 0) -> MemoryMetrics:
    # Each is cut at another place, and none behind its end.
    cuts = [min(cut + number % 3, len(output.token_ids) - 1) for number, output in enumerate(undisturbed)]
    emitted = [output.token_ids[:cut] for cut, output in zip(cuts, undisturbed)]
    replayed, metrics = run(directory, emitted, num_drafts=num_drafts)
    for before, after in zip(undisturbed, replayed):
        assert (after.token_ids, after.finish_reason) == (before.token_ids, before.finish_reason)
        rest = before.logprobs[len(before.logprobs) - len(after.logprobs) :]
        assert len(rest) == len(after.logprobs) > 0
        for expected, found in zip(rest, after.logprobs):
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [entry.logprob for entry in found.top] == pytest.approx(
                [entry.logprob for entry in expected.top], abs=1e-4
            )
    return metrics


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Path:
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[Output]:
    return run(model, [[] for _ in requests()])[0]


@pytest.mark.parametrize("cut", CUTS)
def test_an_engine_goes_on_as_the_one_before_would_have(model: Path, undisturbed: list[Output], cut: int) -> None:
    assert_goes_on(model, undisturbed, cut)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


def test_so_does_a_prefill_engine_that_computes_prompt_and_output(
    model: Path, undisturbed: list[Output], pairs: list[Pair]
) -> None:
    pair = Pair(model, transport="shm", max_model_len=112)
    pairs.append(pair)
    for number, ((prompt, sampling), output) in enumerate(zip(requests(), undisturbed)):
        emitted = output.token_ids[: min(5 + number, len(output.token_ids) - 1)]
        pair.tokens[f"r{number}"] = list(emitted)
        message = make_message(number, prompt, sampling, emitted, pair.addresses["prefill"])
        pair.cores["decode"].put(CLIENT, message)
    deadline = Deadline.after(60.0)
    while len(pair.finish_reasons) < len(undisturbed):
        assert not deadline.has_passed
        for core in pair.cores.values():
            core.step(wait_s=0.001)
    assert [pair.tokens[f"r{number}"] for number in range(len(undisturbed))] == [o.token_ids for o in undisturbed]
    assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) > 0


@pytest.mark.parametrize("name", NUM_DRAFT_LAYERS)
def test_so_do_engines_that_draft(name: str) -> None:
    directory = draft_model_dir(name)
    plain, _ = run(directory, [[] for _ in requests()])
    for cut in CUTS:
        metrics = assert_goes_on(directory, plain, cut, num_drafts=2)
        assert metrics.value(SPEC_DRAFT_TOKENS, position="0") > 0
