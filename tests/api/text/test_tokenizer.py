"""Tokenizer, incremental detokenizer and the thread pool around them."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from atom_cluster.api.text.tokenizer import IncrementalDetokenizer, Tokenizer, TokenizerService
from atom_cluster.errors import ConfigError, Overloaded
from atom_cluster.tools.demo_model import demo_model_dir
from tests.api.tiny_tokenizers import EOS_ID, VOCAB_SIZE, byte_level, sentencepiece_like

BYTE_LEVEL = Tokenizer(byte_level())
SENTENCEPIECE = Tokenizer(sentencepiece_like())


def pushed_one_by_one(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [detokenizer.push((token_id,)) for token_id in ids] + [detokenizer.flush()]


@given(st.text())
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
def test_text_survives_the_way_through_tokens_one_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    shown = ""
    for piece in pushed_one_by_one(tokenizer, ids):
        shown += piece
        assert whole.startswith(shown)
    assert shown == whole


@given(st.lists(st.integers(0, VOCAB_SIZE + 1), max_size=40), st.booleans())
def test_any_byte_level_tokens_give_the_text_the_library_gives(ids: list[int], skips: bool) -> None:
    pieces = pushed_one_by_one(BYTE_LEVEL, ids, skip_special_tokens=skips)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=skips)


@given(st.lists(st.sampled_from(["\u2581", "\u2581the", "\u2581cat", "s", "</s>", "<0xE2>", "<0x82>", "<0xAC>"])))
def test_special_tokens_do_not_swallow_spaces_of_sentencepiece_words(tokens: list[str]) -> None:
    # A run with an invalid byte is rewritten as a whole by the library, which cannot be done to text already shown.
    if "\ufffd" in SENTENCEPIECE.decode(ids := [SENTENCEPIECE.token_id(token) or 0 for token in tokens]):
        return
    assert "".join(pushed_one_by_one(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


def test_an_output_goes_on_where_its_prompt_ended() -> None:
    """A decoder that strips the space of the first word takes no output's first word for that."""
    the, cat = (SENTENCEPIECE.token_id(word) for word in ("\u2581the", "\u2581cat"))
    end = SENTENCEPIECE.token_id("</s>")
    assert the is not None and cat is not None
    for before, text in ((the, " cat the"), (end, "cat the"), (None, "cat the")):
        detokenizer = IncrementalDetokenizer(SENTENCEPIECE, before=before)
        assert detokenizer.push((cat,)) + detokenizer.push((the,)) + detokenizer.flush() == text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
def test_tokens_begin_in_their_text_where_the_ones_before_them_end(tokenizer: Tokenizer) -> None:
    mark = "</s>" if tokenizer is SENTENCEPIECE else "<|im_start|>"
    text = f"a {mark}é the"
    offsets = dict(zip(tokenizer.offsets(text), tokenizer.encode(text)))
    assert sorted(offsets) == [0, 1, 2, 2 + len(mark), 3 + len(mark), *range(4 + len(mark), len(text))]
    assert tokenizer.token_text(offsets[2]) == mark
    assert tokenizer.offsets("€") == ([0, 0, 0] if tokenizer is BYTE_LEVEL else [0, 0, 0, 0])


@given(st.text(max_size=40), st.integers(1, 7))
def test_grouping_of_tokens_does_not_change_text_or_stop(text: str, size: int) -> None:
    ids = BYTE_LEVEL.encode(text + "ab€ stop tail")
    singly = IncrementalDetokenizer(BYTE_LEVEL, stop_strings=("€ st",))
    grouped = IncrementalDetokenizer(BYTE_LEVEL, stop_strings=("€ st",))
    one = "".join(singly.push((token_id,)) for token_id in ids)
    many = "".join(grouped.push(ids[start : start + size]) for start in range(0, len(ids), size))
    assert one == many
    assert singly.num_tokens == grouped.num_tokens
    assert singly.matched_stop == grouped.matched_stop == "€ st"


def test_tokens_are_counted_up_to_the_one_that_completes_a_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop_strings=("c",))
    assert detokenizer.push(BYTE_LEVEL.encode("abcdef")) == "ab"
    assert detokenizer.num_tokens == 3
    assert detokenizer.flush() == ""


def test_flush_gives_what_a_stop_string_kept_back_and_marks_an_unfinished_character() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop_strings=("xyz",))
    assert detokenizer.push(BYTE_LEVEL.encode("axy€")[:-1]) == "a"
    assert detokenizer.flush() == "xy\ufffd"


def test_token_bytes_are_those_of_the_text() -> None:
    for tokenizer, text in ((BYTE_LEVEL, "hé€😀 \n"), (SENTENCEPIECE, " the cat é")):
        joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
        assert joined.decode().lstrip() == text.lstrip()
    assert BYTE_LEVEL.token_bytes(EOS_ID) == b"<|im_end|>"
    assert BYTE_LEVEL.token_bytes(VOCAB_SIZE) == b""


def test_text_far_over_the_context_is_recognised_without_encoding_it_all() -> None:
    assert BYTE_LEVEL.surely_exceeds("a" * 1_000_000, 1000)
    assert not BYTE_LEVEL.surely_exceeds("a" * 1_000, 1000)


def test_limits_saved_in_the_tokenizer_file_do_not_cut_prompts() -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend).encode("abcdef")) == 6


def test_directory_gives_special_tokens_in_either_spelling(model_directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(model_directory)
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.json: not found"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ConfigError, match="tokenizer.model has to be converted"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ConfigError, match="tokenizer.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def tokenizer_directory(directory: Path, config: dict[str, object], *, prescribes_bos: bool) -> Path:
    backend = byte_level()
    if prescribes_bos:
        backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)])
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"added_tokens_decoder": {"259": {"content": "<b>"}, "258": {"content": "<a>", "special": True}}},
        {"eos_token": "</s>"},
    ],
)
@pytest.mark.parametrize("prescribes_bos", [False, True])
def test_tokens_are_those_of_transformers(tmp_path: Path, config: dict[str, object], prescribes_bos: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = tokenizer_directory(tmp_path, config, prescribes_bos=prescribes_bos)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    for text in ("a <a><b></s>", "<|im_start|>a", ""):
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prescribes_bos", [False, True])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"add_bos_token": True}, [256, 64]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 64, 257]),
        ({"add_bos_token": True, "bos_token": None}, [64]),
    ],
)
def test_a_token_that_the_config_wants_around_texts_is_there_once(
    tmp_path: Path, wanted: dict[str, object], expected: list[int], prescribes_bos: bool
) -> None:
    tokenizer = Tokenizer.from_directory(tokenizer_directory(tmp_path, wanted, prescribes_bos=prescribes_bos))
    assert tokenizer.encode("a") == ([256, *expected] if prescribes_bos and expected[0] != 256 else expected)
    assert tokenizer.encode("a", add_special_tokens=False) == [64]


def test_names_of_special_tokens_may_be_in_the_older_file_and_models_may_have_their_own(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "old", "pad_token": {"content": "p"}}))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "extra_special_tokens": {"image_token": "<image>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.from_directory(tmp_path).special_tokens
    assert found == {"eos_token": "<|im_end|>", "pad_token": "p", "image_token": "<image>"}


async def test_the_pool_refuses_work_beyond_its_bound_and_then_goes_on() -> None:
    service = TokenizerService(BYTE_LEVEL, max_pending=2)
    release = threading.Event()
    waiting = [asyncio.create_task(service.run(release.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await service.run(lambda: None)
    release.set()
    await asyncio.gather(*waiting)
    assert await service.run(lambda: BYTE_LEVEL.encode("a")) == BYTE_LEVEL.encode("a")
    service.close()


@pytest.mark.demo_model
@settings(deadline=None)
@given(text=st.text())
def test_real_vocabulary_gives_the_text_back(text: str) -> None:
    directory = demo_model_dir()
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("the demo model is not here; `atom-cluster get-demo-model` fetches it")
    tokenizer = _demo_tokenizer(directory)
    ids = tokenizer.encode(text)
    assert "".join(pushed_one_by_one(tokenizer, ids)) == tokenizer.decode(ids)


@functools.cache
def _demo_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)
