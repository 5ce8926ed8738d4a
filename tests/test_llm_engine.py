from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ProfileRefused
from atom_cluster.llm_output import GenerationOutput, StreamedOutput
from tests.tiny_models import VOCAB_SIZE, random_tokens, tiny_model_dir

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer in which every token is one printable character or a pair of them."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model_dir("llama"), directory)
    singles = [chr(code) for code in range(0x21, 0x7F)]
    pairs = [first + second for first in singles[32:58] for second in singles[64:71]]
    vocab = {token: token_id for token_id, token in enumerate((singles + pairs)[:VOCAB_SIZE])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[LLMEngine]:
    with LLMEngine(
        model_dir, dtype="float64", device="cpu", block_size=8, num_blocks=64, max_model_len=128, num_threads=1
    ) as engine:
        yield engine


def test_importing_the_package_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, atom_cluster; assert not {'torch', 'ray'} & set(sys.modules);"
        "from atom_cluster import SamplingParams; assert not {'torch', 'ray'} & set(sys.modules);"
        "assert {'LLMEngine', 'SamplingParams', '__version__'} <= set(dir(atom_cluster))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import atom_cluster

    with pytest.raises(AttributeError, match="LLMEngin"):
        atom_cluster.LLMEngin  # noqa: B018


def test_an_output_has_text_tokens_counts_and_times(engine: LLMEngine) -> None:
    (output,) = engine.generate("Hello", GREEDY)
    assert output["finish_reason"] == "length"
    assert (output["num_tokens_input"], output["num_tokens_output"]) == (5, 12)
    assert len(output["token_ids"]) == 12
    assert len(output["text"]) >= 12
    assert 0 < output["ttft"] <= output["latency"]
    assert output["tpot"] == pytest.approx((output["latency"] - output["ttft"]) / 11)
    assert "logprobs" not in output


def test_prompts_may_be_texts_or_token_ids(engine: LLMEngine) -> None:
    token_ids = [list(engine.encode("Hello")), list(engine.encode("you"))]
    from_text = engine.generate(["Hello", "you"], GREEDY)
    from_ids = engine.generate(token_ids, [GREEDY, GREEDY])
    assert [output["text"] for output in from_text] == [output["text"] for output in from_ids]


def test_logprobs_come_when_asked_for(engine: LLMEngine) -> None:
    (output,) = engine.generate("Hello", SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2))
    assert [found.top[0].token_id for found in output["logprobs"]] == output["token_ids"]
    assert all(found.logprob <= 0 and len(found.top) == 2 for found in output["logprobs"])


def test_n_outputs_are_independent_and_reproducible(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=1.5, n=3, seed=7, max_tokens=8, ignore_eos=True)
    outputs = engine.generate(["Hello", "you"], params)
    assert len(outputs) == 6
    assert len({tuple(output["token_ids"]) for output in outputs[:3]}) == 3
    again = engine.generate("Hello", SamplingParams(temperature=1.5, seed=8, max_tokens=8, ignore_eos=True))
    assert again[0]["token_ids"] == outputs[1]["token_ids"]


def test_requests_without_a_seed_differ_from_each_other(engine: LLMEngine) -> None:
    outputs = engine.generate(["Hello"] * 3, SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True))
    assert len({tuple(output["token_ids"]) for output in outputs}) == 3


def test_a_stop_string_cuts_the_text_before_it_and_ends_the_request(engine: LLMEngine) -> None:
    (whole,) = engine.generate("Hello", GREEDY)
    stop = whole["text"][5:8]
    (cut,) = engine.generate(
        "Hello", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_strings=(stop,))
    )
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["num_tokens_output"] < 12
    assert cut["token_ids"] == whole["token_ids"][: cut["num_tokens_output"]]
    # The engine forgets the request, and the next one is not disturbed by it.
    assert engine.generate("Hello", GREEDY)[0]["token_ids"] == whole["token_ids"]


def test_a_stop_string_that_does_not_occur_changes_nothing(engine: LLMEngine) -> None:
    (whole,) = engine.generate("Hello", GREEDY)
    almost = whole["text"][-3:] + "~~"
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_strings=(almost,))
    assert engine.generate("Hello", params)[0]["text"] == whole["text"]


def test_a_stop_token_ends_the_output(engine: LLMEngine) -> None:
    (whole,) = engine.generate("Hello", GREEDY)
    stop_id = whole["token_ids"][4]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop_id,))
    (cut,) = engine.generate("Hello", params)
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(stop_id) + 1]


def test_without_max_tokens_the_output_fills_the_context(engine: LLMEngine) -> None:
    (output,) = engine.generate("Hello", SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert output["finish_reason"] == "length"
    assert output["num_tokens_input"] + output["num_tokens_output"] == 128


def test_step_by_step_gives_what_generate_does(engine: LLMEngine) -> None:
    expected = engine.generate(["Hello", "you"], GREEDY)
    streamed: list[StreamedOutput] = []
    names = engine.add_request(["Hello", "you"], GREEDY, stream_callback=streamed.append, request_ids=["a", "b"])
    assert names == ["a", "b"]
    finished = []
    while not engine.is_finished():
        finished += engine.step()
    assert {output["request_id"]: output["text"] for output in finished} == {
        "a": expected[0]["text"],
        "b": expected[1]["text"],
    }
    for name, output in zip(names, expected):
        pieces = [piece for piece in streamed if piece.request_id == name]
        assert "".join(piece.text for piece in pieces) == output["text"]
        assert [token for piece in pieces for token in piece.token_ids] == output["token_ids"]
        assert [piece.finish_reason for piece in pieces][-1] == "length"


def test_outputs_of_requests_added_before_are_not_lost_by_generate(engine: LLMEngine) -> None:
    (early,) = engine.add_request("Hello", SamplingParams(max_tokens=2, temperature=0.0), request_ids=["early"])
    (output,) = engine.generate("you", GREEDY)
    assert output["request_id"] != early
    assert not engine.is_finished()
    finished = []
    while not engine.is_finished():
        finished += engine.step()
    assert [output["request_id"] for output in finished] == [early]
    assert finished[0]["num_tokens_output"] == 2


def test_text_goes_on_where_the_prompts_ended(model_dir: Path, tmp_path: Path) -> None:
    """A word of SentencePiece begins with a space, which is part of it everywhere but at the beginning of a text."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    vocab = {"<unk>": 0, "</s>": 1, "\u2581": 2, "\u2581the": (word := 3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    with LLMEngine(directory, device="cpu", num_blocks=64, max_num_requests=2, max_model_len=64) as engine:
        forced = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=((word, 100.0),))
        (output,) = engine.generate([[word]], forced)
    assert output["token_ids"] == [word]
    assert output["text"] == " the"


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ("", GREEDY, "prompt"),
        ([[]], GREEDY, "prompt"),
        ([[1, VOCAB_SIZE]], GREEDY, "prompt"),
        ([[1, -1]], GREEDY, "prompt"),
        ("Hi", SamplingParams(temperature=-1.0), "temperature"),
        ("Hi", SamplingParams(n=0), "n"),
        ("Hi", SamplingParams(stop_strings=("",)), "stop"),
        (["Hi", "you"], [GREEDY], "sampling_params"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(
    engine: LLMEngine, prompt: list[list[int]] | str, params: SamplingParams, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(prompt, params)
    assert caught.value.param == param
    assert engine.is_finished()


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(128, 1), (120, 9), (300, 1)])
def test_what_exceeds_the_context_is_refused(engine: LLMEngine, num_prompt: int, max_tokens: int) -> None:
    with pytest.raises(ContextLengthExceeded):
        engine.generate([random_tokens(num_prompt)], SamplingParams(max_tokens=max_tokens))


def test_the_context_is_what_the_kv_cache_can_hold() -> None:
    with LLMEngine(tiny_model_dir("llama"), device="cpu", num_blocks=3, block_size=8, num_threads=1) as engine:
        with pytest.raises(ContextLengthExceeded, match="context of 24"):
            engine.generate([random_tokens(14)], SamplingParams(max_tokens=11))
        (output,) = engine.generate([random_tokens(14)], SamplingParams(max_tokens=None, ignore_eos=True))
        assert output["num_tokens_output"] == 10


def test_a_step_that_fails_is_raised_and_open_requests_end(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError("no memory for logits")

    with LLMEngine(model_dir, device="cpu", num_blocks=16, num_threads=1) as engine:
        monkeypatch.setattr("atom_cluster.runner.model_runner.sample", fail)
        with pytest.raises(MemoryError, match="no memory for logits"):
            engine.generate("Hello", GREEDY)


def test_what_exactly_fills_the_context_is_served(engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    (output,) = engine.generate([random_tokens(120)], params)
    assert output["num_tokens_output"] == 8


def test_request_ids_in_use_are_refused(engine: LLMEngine) -> None:
    with pytest.raises(InvalidRequest, match="request id"):
        engine.add_request(["Hi", "you"], GREEDY, request_ids=["a", "a"])


def test_what_the_engine_refuses_is_raised_as_what_it_is_when_the_others_are_through(engine: LLMEngine) -> None:
    bad = SamplingParams(max_tokens=2, logit_bias=((10**6, 1.0),))
    with pytest.raises(InvalidRequest, match="bad: logit_bias: token ids must be in") as caught:
        engine.generate([[5, 6], [7, 8]], [bad, GREEDY], request_ids=["bad", "good"])
    assert caught.value.param == "logit_bias"
    assert engine.is_finished()


def test_an_unknown_option_is_a_type_error_that_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="`blok_size`; did you mean `block_size`"):
        LLMEngine("anywhere", blok_size=8)  # type: ignore[arg-type]


def test_a_gang_of_no_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLMEngine("anywhere", tensor_parallel_size=0)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        LLMEngine(tmp_path / "absent")


def test_a_model_without_a_tokenizer_takes_token_ids_only() -> None:
    with LLMEngine(tiny_model_dir("llama"), device="cpu", num_blocks=16, num_threads=1) as engine:
        (output,) = engine.generate([[5, 6]], GREEDY)
        assert (output["text"], output["num_tokens_output"]) == ("", 12)
        with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
            engine.generate("Hello", GREEDY)


def test_two_ranks_in_processes_of_their_own_say_what_one_does() -> None:
    prompts, params = [[5, 6, 7], [9, 8]], SamplingParams(temperature=0.8, seed=3, max_tokens=6)
    outputs = []
    for size in (1, 2):
        with LLMEngine(tiny_model_dir("llama"), dtype="float64", num_blocks=64, tensor_parallel_size=size) as engine:
            outputs.append([output["token_ids"] for output in engine.generate(prompts, params)])
    assert outputs[0] == outputs[1]


def test_a_profiler_window_leaves_a_trace_and_requests_go_on(model_dir: Path, tmp_path: Path) -> None:
    prompts = [random_tokens(5, seed=seed) for seed in range(2)]
    profile = ProfileConfig(directory=str(tmp_path))
    with LLMEngine(model_dir, device="cpu", num_blocks=64, block_size=8, num_threads=1, profile=profile) as engine:
        expected = engine.generate(prompts, GREEDY)
        with pytest.raises(ProfileRefused, match="no window is open"):
            engine.stop_profile()
        names = engine.add_request(prompts, GREEDY)
        engine.start_profile()
        with pytest.raises(ProfileRefused, match="a window is open already"):
            engine.start_profile()
        engine.step()
        (trace,) = engine.stop_profile()
        outputs = {output["request_id"]: output for output in _finish(engine)}
    assert [outputs[name]["token_ids"] for name in names] == [output["token_ids"] for output in expected]
    assert trace.parent == tmp_path and trace.name.startswith("local_rank0_")


def test_profiling_without_a_directory_is_refused_by_the_name_of_its_key(engine: LLMEngine) -> None:
    with pytest.raises(ProfileRefused, match=r"observability\.profile\.directory"):
        engine.start_profile()


def _finish(engine: LLMEngine) -> list[GenerationOutput]:
    outputs = []
    while not engine.is_finished():
        outputs += engine.step()
    return outputs
