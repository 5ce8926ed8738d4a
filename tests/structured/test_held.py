from __future__ import annotations

import pytest

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.grammars import CompileGrammar, ForgetGrammar, GrammarReady
from atom_cluster.messages.requests import GrammarSpec, SamplingParams
from atom_cluster.messages.steps import NewRow
from atom_cluster.structured.held import HeldGrammars
from tests.structured.compilers import HeldCompiler
from tests.structured.vocabularies import END, ids_of

WORD = GrammarSpec(kind="regex", text="[a-f]+", after=(2,))


def compile_(grammar_id: int, text: str = "[a-f]+") -> CompileGrammar:
    return CompileGrammar(grammar_id=grammar_id, spec=GrammarSpec(kind="regex", text=text))


def row(grammar_id: int | None, output: tuple[int, ...] = ()) -> NewRow:
    return NewRow(
        row=0,
        request_id="r",
        token_ids=(1, *output),
        num_prompt_tokens=1,
        pages=(),
        sampling=SamplingParams(grammar=WORD),
        eos_token_ids=(END,),
        grammar_id=grammar_id,
    )


def test_a_row_begins_once_its_grammar_was_reported_behind_the_output_that_it_came_with() -> None:
    compiler = HeldCompiler()
    held = HeldGrammars(compiler)
    held.execute([compile_(3)])
    assert held.poll() == []
    with pytest.raises(ProtocolError, match="request r samples before its grammar 3"):
        held.begin(row(3))
    compiler.finish()
    assert (held.poll(), held.poll()) == ([GrammarReady(grammar_id=3)], [])
    assert not held.begin(row(3)).applies
    state = held.begin(row(3, (2, *ids_of("ab"))))
    assert (state.applies, state.num_tokens) == (True, 3)
    for unknown in (4, None):
        with pytest.raises(ProtocolError):
            held.begin(row(unknown))


def test_each_compilation_ends_with_one_report_and_what_is_forgotten_is_not_begun() -> None:
    compiler = HeldCompiler()
    held = HeldGrammars(compiler)
    held.execute([compile_(0), compile_(1), compile_(2, "("), ForgetGrammar(grammar_id=1), ForgetGrammar(grammar_id=9)])
    compiler.finish()
    reports = {report.grammar_id: report.error for report in held.poll()}
    assert reports.keys() == {0, 1, 2}
    assert reports[0] is None
    assert reports[1] == "it is not wanted any more"
    assert "cannot be used" in str(reports[2])
    held.execute([ForgetGrammar(grammar_id=0)])
    with pytest.raises(ProtocolError):
        held.begin(row(0))


def test_an_error_that_is_not_the_grammar_s_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    compiler = HeldCompiler()
    held = HeldGrammars(compiler)
    held.execute([compile_(0)])
    _, future = compiler._waiting.popleft()
    future.set_exception(MemoryError("none left"))
    assert held.poll() == [GrammarReady(grammar_id=0, error="none left")]
    assert "grammar 0 could not be compiled" in caplog.text


def test_without_a_vocabulary_every_compilation_fails() -> None:
    held = HeldGrammars(None)
    held.warm_up()
    held.execute([compile_(0)])
    assert held.poll() == [GrammarReady(grammar_id=0, error="this runner has no vocabulary")]
    held.close()
