from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.errors import ConfigError, InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.vocabulary import load_vocabulary
from tests.structured.vocabularies import word_tokenizer, word_vocabulary

YES = GrammarSpec(kind="choice", text='["yes"]')


def test_equal_specs_are_compiled_once_wherever_they_begin() -> None:
    compiler = GrammarCompiler(word_vocabulary)
    first = compiler.submit(YES)
    assert compiler.submit(GrammarSpec(kind="choice", text='["yes"]', after=(5,))) is first
    assert compiler.submit(GrammarSpec(kind="choice", text='["no"]')) is not first
    assert first.result().vocabulary is word_vocabulary()
    compiler.close()
    compiler.close()


def test_what_was_not_used_for_long_is_compiled_again() -> None:
    compiler = GrammarCompiler(word_vocabulary, capacity=2)
    first = compiler.submit(YES)
    compiler.submit(GrammarSpec(kind="json_object"))
    assert compiler.submit(YES) is first
    for number in range(2):
        compiler.submit(GrammarSpec(kind="regex", text=f"a{{{number + 1}}}"))
    assert compiler.submit(YES) is not first
    assert compiler.submit(YES).result().matcher is not first.result().matcher
    compiler.close()


def test_a_failure_is_not_kept() -> None:
    compiler = GrammarCompiler(word_vocabulary)
    bad = GrammarSpec(kind="regex", text="(")
    first = compiler.submit(bad)
    with pytest.raises(InvalidRequest):
        first.result()
    assert compiler.submit(bad) is not first
    compiler.close()


def test_a_vocabulary_is_made_once_per_file(tmp_path: Path) -> None:
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 300)
    assert load_vocabulary(str(tmp_path), 300) is vocabulary
    assert load_vocabulary(tmp_path, 400) is not vocabulary
    assert (vocabulary.num_words, vocabulary.marker) == (10, word_vocabulary().marker)


def test_a_model_without_or_with_a_broken_tokenizer_has_no_grammars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = GrammarCompiler.for_model(tmp_path, 300)
    with pytest.raises(InvalidRequest, match="tokenizer.json"):
        compiler.submit(YES).result()
    compiler.warm_up()
    assert "no structured output" in caplog.text
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json"):
        compiler.submit(YES).result()
    compiler.close()
