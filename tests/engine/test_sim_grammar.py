"""Simulated rows with a grammar say what fits it, the same with any drafts; the engine ends one that cannot go on."""

from __future__ import annotations

import re

import pytest

from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.messages.requests import EngineRequest, GrammarSpec, SamplingParams, TokenBatch, TokenDelta
from atom_cluster.structured.compiler import GrammarCompiler
from tests.factories import assert_clean, make_engine
from tests.fakes import ListOutbox, Network, VirtualClock
from tests.structured.vocabularies import END, word_tokenizer, word_vocabulary

WORD = GrammarSpec(kind="regex", text="[a-f]{3}-[0-9]{2}")


def make_request(request_id: str, **sampling: object) -> EngineRequest:
    params = SamplingParams(seed=0, max_tokens=30, **sampling)  # type: ignore[arg-type]
    return EngineRequest(request_id=request_id, token_ids=(1, 2, 3), sampling=params, eos_token_ids=(END,))


def run(
    requests: list[EngineRequest], *, num_drafts: int = 0, has_vocabulary: bool = True
) -> dict[str, list[TokenDelta]]:
    """Deltas of each request."""
    outbox, network = ListOutbox(), Network(VirtualClock())
    runner = SimulatedRunner(
        simulation=SimulationConfig(num_blocks=64, vocab_size=word_vocabulary().vocab_size),
        block_size=4,
        max_num_requests=8,
        max_model_len=64,
        max_drafts=num_drafts,
        grammars=GrammarCompiler(word_vocabulary) if has_vocabulary else None,
        clock=network.clock,
    )
    engine = make_engine(network, runner=runner, outbox=outbox)
    for request in requests:
        engine.put("client", request)
    while engine.step():
        pass
    assert_clean(engine)
    found: dict[str, list[TokenDelta]] = {request.request_id: [] for request in requests}
    for _, message in outbox.sent:
        for delta in message.deltas if isinstance(message, TokenBatch) else ():
            found[delta.request_id].append(delta)
    return found


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def test_tokens_fit_the_grammar_and_the_output_ends_where_it_may() -> None:
    requests = [
        make_request("word", grammar=WORD),
        make_request("free"),
        make_request("choice", grammar=GrammarSpec(kind="choice", text='["yes"]')),
    ]
    plain = run(requests)
    tokens = tokens_of(plain["word"])
    assert tokens[-1] == END
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", word_tokenizer().decode(tokens))
    assert plain["word"][-1].finish_reason == plain["choice"][-1].finish_reason == "stop"
    assert (len(tokens_of(plain["free"])), plain["free"][-1].finish_reason) == (30, "length")
    drafted = run(requests, num_drafts=3)
    assert {key: tokens_of(deltas) for key, deltas in drafted.items()} == {
        key: tokens_of(deltas) for key, deltas in plain.items()
    }


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_request_that_cannot_be_constrained_ends_alone_and_leaves_nothing(num_drafts: int) -> None:
    found = run([make_request("word", grammar=WORD), make_request("free")], num_drafts=num_drafts, has_vocabulary=False)
    (end,) = found["word"]
    assert (end.token_ids, end.finish_reason) == ((), "error")
    assert end.error is not None
    assert (end.error.kind, "no vocabulary" in end.error.message) == ("RequestFailed", True)
    assert len(tokens_of(found["free"])) == 30


def test_a_model_without_end_tokens_has_no_grammars() -> None:
    request = EngineRequest(request_id="r", token_ids=(1,), sampling=SamplingParams(seed=0, grammar=WORD))
    ((delta,),) = run([request]).values()
    assert delta.error is not None
    assert (delta.error.kind, delta.error.param) == ("InvalidRequest", "grammar")
