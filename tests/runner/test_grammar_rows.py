"""Rows with a grammar among others, in random steps: the same tokens with drafts and in captured steps as without."""

from __future__ import annotations

import msgspec
import pytest

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.grammars import CompileGrammar
from atom_cluster.messages.requests import GrammarSpec, SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.structured.compiler import GrammarCompiler
from tests.runner.context_model import VOCAB, ContextModel, make_runner
from tests.runner.row_driver import RowDriver
from tests.runner.stand_in_graphs import use_stand_in_graphs
from tests.runner.test_graphs import make_model
from tests.runner.test_speculation import NUM_TOKENS, PARTS, SAMPLINGS, prompts
from tests.structured.compilers import HeldCompiler
from tests.structured.vocabularies import ids_of, word_vocabulary

GRAMMARS = (
    (GrammarSpec(kind="regex", text="[b-m]+"), set(ids_of("bcdefghijklm"))),
    (GrammarSpec(kind="regex", text="(ab?c[p-z])+"), set(ids_of("abcpqrstuvwxyz"))),
    (None, set(range(VOCAB))),
)
"""Without end, as these rows are never told that they have ended; and which tokens there may be."""
WANTED = tuple(
    msgspec.structs.replace(sampling, grammar=GRAMMARS[i % len(GRAMMARS)][0]) for i, sampling in enumerate(SAMPLINGS)
)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    grammars = GrammarCompiler(word_vocabulary)
    driver = RowDriver(ContextModel(**PARTS[3]), seed=1, grammars=grammars)  # type: ignore[arg-type]
    return driver.run(prompts(2), NUM_TOKENS, samplings=WANTED)


def test_rows_have_only_tokens_that_their_grammar_allows(expected: list[list[int]]) -> None:
    assert all(set(tokens) <= GRAMMARS[i % len(GRAMMARS)][1] for i, tokens in enumerate(expected))


def test_a_row_that_samples_before_its_grammar_is_compiled_is_an_error_of_the_plan() -> None:
    runner = make_runner(model=ContextModel(**PARTS[0]), grammars=HeldCompiler())  # type: ignore[arg-type]
    spec = GRAMMARS[0][0]
    assert spec is not None
    new = NewRow(
        row=0,
        request_id="r",
        token_ids=(1, 2),
        num_prompt_tokens=2,
        pages=((0,),),
        sampling=SamplingParams(seed=0, grammar=spec),
        grammar_id=7,
    )
    plan = StepPlan(step_id=0, new_rows=(new,), grammars=(CompileGrammar(grammar_id=7, spec=spec),))
    assert runner.run(plan).sampled == ()
    with pytest.raises(ProtocolError, match="grammar 7"):
        runner.run(StepPlan(step_id=1, rows=(RowStep(0, 0, 2, samples=True),)))
    runner.close()


@pytest.mark.parametrize("max_drafts", [0, 1, 3])
@pytest.mark.parametrize("graph_sizes", [(), (1, 3)], ids=["eager", "captured"])
def test_drafts_and_captured_steps_change_nothing(
    monkeypatch: pytest.MonkeyPatch, expected: list[list[int]], max_drafts: int, graph_sizes: tuple[int, ...]
) -> None:
    use_stand_in_graphs(monkeypatch)
    driver = RowDriver(
        make_model(PARTS[3], max_drafts=max_drafts),
        max_drafts=max_drafts,
        seed=2,
        grammars=GrammarCompiler(word_vocabulary),
        graph_sizes=graph_sizes,
    )
    assert driver.run(prompts(2), NUM_TOKENS, samplings=WANTED) == expected
    assert not max_drafts or {one.num_kept for one in driver.verified} >= {0, 1}
