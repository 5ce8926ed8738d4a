"""Structured output and biases: the same tokens whatever an engine does with a request, and always what was asked for.

Random models say nothing, so every constraint acts all the time; beside the rows that have one, others have none.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.messages.steps import RowStep, StepPlan
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, PREEMPTIONS, SPEC_ACCEPTED_TOKENS
from atom_cluster.runner import build
from atom_cluster.runner.grammar_rows import GrammarRows
from atom_cluster.runner.row_state import RowTable
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.held import HeldGrammars
from atom_cluster.structured.vocabulary import load_vocabulary
from tests.equivalence.generation import FREE, GREEDY, PENALIZED, SAMPLED, Request, generate_drafting, open_drafting
from tests.equivalence.pairs import Pair, Side
from tests.equivalence.test_replay import run
from tests.structured_models import EOS_ID, character_tokenizer, structured_model_dir
from tests.tiny_models import random_tokens, tiny_model_dir

CPU = torch.device("cpu")
NO_TABLE = cast("RowTable", None)

SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["id", "kind"],
    "additionalProperties": False,
}
PERSON = GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA))
WORD = GrammarSpec(kind="regex", text="[a-f]{9,12}")
ANYTHING = GrammarSpec(kind="regex", text="(?s:.){14}")
"""Leaves drafts a chance."""
NO_SPACES = tuple((token_id, -30.0) for token_id in character_tokenizer().encode(" \n").ids)
THOUGHT = GrammarSpec(kind="choice", text='["yes", "no"]', after=(2,))


def with_grammar(kind: SamplingParams, grammar: GrammarSpec, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(kind, grammar=grammar, **{"ignore_eos": False, "max_tokens": 30, **changes})


def requests() -> list[Request]:
    samplings = [
        with_grammar(SAMPLED, PERSON, max_tokens=80, logit_bias=NO_SPACES),
        GREEDY,
        with_grammar(GREEDY, PERSON, max_tokens=80, logit_bias=NO_SPACES),
        with_grammar(FREE, WORD, logprobs=2),
        with_grammar(PENALIZED, WORD, min_tokens=12),
        FREE,
        with_grammar(GREEDY, ANYTHING, max_tokens=60),
        # Token 2, which ends the thought, is all but certain.
        with_grammar(SAMPLED, THOUGHT, logit_bias=((2, 100.0),)),
        msgspec.structs.replace(SAMPLED, logit_bias=((7, 3.0), (9, -100.0), (EOS_ID, 1.0))),
    ]
    return [(random_tokens(4 + 7 * i, seed=i), sampling) for i, sampling in enumerate(samplings)]


@pytest.fixture(scope="module")
def directory() -> Path:
    return structured_model_dir("glm4_moe")


def generate(directory: Path, *, num_tokens: int = 0, **options: object) -> list[list[int]]:
    """Output of the requests, with so many drafts after each token."""
    return generate_drafting(directory, requests(), num_tokens=num_tokens, **options)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return generate(directory)


def text_of(token_ids: Sequence[int]) -> str:
    return character_tokenizer().decode(list(token_ids))


def test_every_output_is_what_was_asked_for(expected: list[list[int]]) -> None:
    constrained = [tokens for tokens, (_, sampling) in zip(expected, requests()) if sampling.grammar is not None]
    assert all(tokens[-1] == EOS_ID for tokens in constrained)
    first, greedy, word, long_word, anything, thought = map(text_of, constrained)
    for text in (first, greedy):
        assert json.loads(text).keys() == {"id", "kind"}
    assert re.fullmatch("[a-f]{9,12}", word)
    assert re.fullmatch("[a-f]{12}", long_word)
    assert len(anything) == 14
    assert thought in ("yes", "no")
    assert constrained[-1][0] == 2
    assert 9 not in expected[-1]
    assert 7 in expected[-1]


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_speculative_output_is_the_same(directory: Path, expected: list[list[int]], num_tokens: int) -> None:
    metrics = MemoryMetrics()
    assert generate(directory, num_tokens=num_tokens, metrics=metrics) == expected
    assert metrics.value(SPEC_ACCEPTED_TOKENS) > 0


def test_so_it_is_in_chunks_and_without_asynchronous_scheduling(directory: Path, expected: list[list[int]]) -> None:
    assert generate(directory, max_num_batched_tokens=13, async_scheduling=False) == expected


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_so_it_is_when_requests_are_preempted(directory: Path, expected: list[list[int]], num_tokens: int) -> None:
    metrics = MemoryMetrics()
    assert generate(directory, num_blocks=16, num_tokens=num_tokens, metrics=metrics) == expected
    assert metrics.value(PREEMPTIONS) > 0


def test_so_it_is_when_others_are_answered_while_ranks_compile(
    directory: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class LateCompiler(GrammarCompiler):
        @classmethod
        def for_model(cls, directory: str | Path, vocab_size: int, *, capacity: int = 1) -> GrammarCompiler:
            return cls(lambda: load_vocabulary(directory, vocab_size) if gate.wait(60) else pytest.fail("too late"))

    monkeypatch.setattr(build, "GrammarCompiler", LateCompiler)
    wanted = requests()
    free = {str(i) for i, (_, sampling) in enumerate(wanted) if sampling.grammar is None}
    with open_drafting(directory, num_tokens=0) as engine:
        prompts, samplings = zip(*wanted)
        names = engine.add_request(prompts, samplings, request_ids=[str(i) for i in range(len(wanted))])
        outputs: dict[str, list[int]] = {}
        while not free <= outputs.keys():
            outputs |= {output["request_id"]: output["token_ids"] for output in engine.step()}
        assert outputs.keys() == free
        gate.set()
        while not engine.is_finished():
            outputs |= {output["request_id"]: output["token_ids"] for output in engine.step()}
    assert [outputs[name] for name in names] == expected


@pytest.mark.parametrize(("num_tokens", "num_ranks"), [(0, 1), (2, 1), (1, 2)])
def test_so_it_is_with_prefill_and_decode_apart_and_with_two_ranks(
    directory: Path, expected: list[list[int]], num_tokens: int, num_ranks: int
) -> None:
    decode = Side(num_ranks=num_ranks)
    pair = Pair(directory, transport="shm", num_drafts=num_tokens, max_model_len=112, decode=decode)
    try:
        assert pair.generate(requests(), timeout_s=60.0) == expected
        assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) > 0
    finally:
        pair.close()


@pytest.mark.parametrize(("num_emitted", "num_tokens"), [(1, 0), (5, 2)])
def test_so_it_is_where_another_engine_goes_on(
    directory: Path, expected: list[list[int]], num_emitted: int, num_tokens: int
) -> None:
    cut = [tokens[:num_emitted] for tokens in expected]
    outputs, _ = run(directory, cut, num_drafts=num_tokens, wanted=requests())
    assert [output.token_ids for output in outputs] == expected


def test_a_request_that_cannot_go_on_ends_alone() -> None:
    # The model has no tokenizer, so its runner has no vocabulary to compile for.
    wanted = [(random_tokens(5, seed=1), with_grammar(GREEDY, WORD)), (random_tokens(9, seed=2), GREEDY)]
    outputs, _ = run(tiny_model_dir("llama"), [[], []], wanted=wanted)
    assert [output.finish_reason for output in outputs] == ["error", "length"]
    assert (outputs[0].token_ids, len(outputs[1].token_ids)) == ([], GREEDY.max_tokens)


def test_what_makes_no_sense_is_refused_before_anything_runs(directory: Path) -> None:
    with LLMEngine(directory, device="cpu", num_blocks=16, num_threads=1) as engine:
        for sampling, param in (
            (SamplingParams(grammar=GrammarSpec(kind="regex", text="(")), "grammar"),
            (SamplingParams(grammar=WORD, ignore_eos=True), "ignore_eos"),
            (SamplingParams(logit_bias=((1, 101.0),)), "logit_bias"),
            (SamplingParams(logit_bias=((1, 1.0), (1, 2.0))), "logit_bias"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                engine.add_request([[5, 6]], sampling)
            assert caught.value.param == param
        (output,) = engine.generate([[5, 6]], SamplingParams(grammar=WORD, seed=1))
        assert re.fullmatch("[a-f]{9,12}", output["text"])


def test_steps_without_grammars_ask_the_device_for_nothing() -> None:
    held = HeldGrammars(GrammarCompiler(lambda: pytest.fail("no vocabulary is needed")))
    rows = GrammarRows(held=held, num_drafts=3, device=CPU)
    rows.apply(StepPlan(step_id=0, freed_rows=(1,), new_rows=(), rows=(RowStep(0, 4, 1, samples=True),)))
    assert rows.read((RowStep(0, 4, 1, samples=True),), NO_TABLE) is None
    rows.close()
