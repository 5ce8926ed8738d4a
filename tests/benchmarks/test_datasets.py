"""Datasets: lengths, shared prefixes, times, repeatability, refusals."""

from __future__ import annotations

import csv
import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from benchmarks.datasets.arrivals import burst_arrivals, rate_arrivals
from benchmarks.datasets.files import custom_workload, hf_files, hf_workload, sharegpt_workload
from benchmarks.datasets.request import FIRST_TOKEN_ID, LoadRequest
from benchmarks.datasets.synthetic import RandomLengths, random_workload, sonnet_workload
from benchmarks.datasets.text import PromptText
from benchmarks.datasets.traces import (
    AZURE_CONVERSATION,
    MOONCAKE_CONVERSATION,
    TraceOptions,
    read_azure,
    read_burstgpt,
    read_mooncake,
    trace_workload,
)


@pytest.fixture(scope="module")
def text() -> PromptText:
    """A tokenizer of one token per word."""
    words = {f"w{index}": index for index in range(3000)} | {"[UNK]": 3000}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PromptText(Tokenizer(backend))


def random_requests(*, seed: int = 0, text: PromptText | None = None, **lengths: float) -> list[LoadRequest]:
    shape = RandomLengths(**{"input_len": 50, "output_len": 5, **lengths})  # type: ignore[arg-type]
    workload = random_workload(shape, num_requests=40, vocab_size=30_000, seed=seed, text=text)
    requests = list(workload.requests)
    assert workload.num_requests == len(requests)
    assert not workload.has_times
    return requests


def test_random_prompts_have_their_length_behind_the_prefixes_that_they_share() -> None:
    requests = random_requests(prefix_len=30, num_prefixes=3)
    prompts = [request.prompt for request in requests]
    assert {len(prompt or ()) for prompt in prompts} == {80}
    assert len({tuple(prompt[:30]) for prompt in prompts if prompt}) == 3
    assert len({tuple(prompt[30:]) for prompt in prompts if prompt}) == 40
    assert all(FIRST_TOKEN_ID <= int(token) < 30_000 for prompt in prompts for token in prompt or ())


def test_lengths_are_drawn_between_the_ratio_and_the_whole() -> None:
    requests = random_requests(input_len=100, output_len=20, range_ratio=0.8)
    assert {80 <= len(request.prompt or ()) <= 100 for request in requests} == {True}
    assert {16 <= request.output_len <= 20 for request in requests} == {True}
    assert len({request.output_len for request in requests}) > 2
    assert {request.output_len for request in random_requests()} == {5}


def test_the_seed_decides_everything() -> None:
    assert random_requests(seed=1) == random_requests(seed=1)
    assert random_requests(seed=1) != random_requests(seed=2)


def test_random_text_has_as_many_tokens_as_asked_for(text: PromptText) -> None:
    for request in random_requests(text=text, prefix_len=8):
        assert isinstance(request.prompt, str)
        assert text.count(request.prompt) == 58


def test_a_chat_template_is_taken_off_the_length(text: PromptText) -> None:
    template = ChatTemplate("w1 w2 {{ messages[0].content }} w3", special_tokens={})
    framed = PromptText(text.tokenizer, template=template)
    assert framed.num_template_tokens == 3
    (request, *_) = random_requests(text=framed)
    assert isinstance(request.prompt, str)
    assert request.prompt.startswith("w1 w2 ")
    assert text.count(request.prompt) == 50
    with pytest.raises(ValueError, match="template alone"):
        random_requests(text=framed, input_len=3)


def test_small_vocabularies_are_used_from_their_middle_on() -> None:
    workload = random_workload(
        RandomLengths(input_len=500, output_len=1), num_requests=1, vocab_size=256, seed=0, text=None
    )
    (request,) = workload.requests
    assert {int(token) // 128 for token in request.prompt or ()} == {1}
    with pytest.raises(ValueError, match="--vocab-size"):
        random_workload(RandomLengths(input_len=5, output_len=1), num_requests=1, vocab_size=1, seed=0, text=None)


@pytest.mark.parametrize(
    ("lengths", "message"), [({"input_len": 0}, "at least 1"), ({"range_ratio": 1.5}, "range-ratio")]
)
def test_impossible_lengths_are_refused(lengths: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_requests(**lengths)


def test_verse_shares_its_beginning_and_is_about_as_long_as_asked_for(text: PromptText) -> None:
    workload = sonnet_workload(num_requests=5, input_len=300, output_len=9, prefix_len=100, seed=0, text=text)
    prompts = [str(request.prompt) for request in workload.requests]
    assert len(set(prompts)) == 5
    assert all(270 <= text.count(prompt) <= 330 for prompt in prompts)
    shared = [a == b for a, b in zip(prompts[0].split(), prompts[1].split())].index(False)
    assert 85 <= shared <= 125
    with pytest.raises(ValueError, match="--tokenizer"):
        sonnet_workload(num_requests=5, input_len=300, output_len=9, prefix_len=100, seed=0, text=None)
    with pytest.raises(ValueError, match="leaves no line"):
        sonnet_workload(num_requests=5, input_len=90, output_len=9, prefix_len=100, seed=0, text=text)


def test_arrivals_start_at_once_and_keep_the_rate() -> None:
    for burstiness in (0.5, 1.0, 4.0):
        arrivals = list(islice(rate_arrivals(20.0, burstiness=burstiness, seed=1), 4001))
        assert arrivals[0] == 0
        assert arrivals == sorted(arrivals)
        assert arrivals[-1] == pytest.approx(4000 / 20.0, rel=0.08)
        gaps = np.diff(arrivals)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.08)  # of a gamma distribution
    assert set(islice(rate_arrivals(float("inf"), burstiness=1.0, seed=1), 50)) == {0.0}
    with pytest.raises(ValueError, match="positive"):
        next(rate_arrivals(0.0, burstiness=1.0, seed=1))


def test_bursts_come_together() -> None:
    assert list(islice(burst_arrivals(3, 2.0), 7)) == [0, 0, 0, 2, 2, 2, 4]


def test_shipped_traces_are_whole() -> None:
    azure, mooncake = list(read_azure(AZURE_CONVERSATION)), list(read_mooncake(MOONCAKE_CONVERSATION))
    assert (len(azure), len(mooncake)) == (19_366, 12_031)
    assert sum(row.num_prompt_tokens for row in azure) / len(azure) == pytest.approx(1155, abs=1)
    assert sum(row.num_output_tokens for row in azure) / len(azure) == pytest.approx(211, abs=1)
    assert azure[-1].arrival_s == pytest.approx(3501.7, abs=1)
    assert sum(len(row.blocks) for row in mooncake) == pytest.approx(288_500, rel=1e-3)
    assert mooncake[-1].arrival_s == pytest.approx(3537.0, abs=0.1)
    assert all(row.blocks[0] == 0 for row in mooncake)


def test_a_trace_is_replayed_faster_and_shorter(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:59:59.5000000,100,10\n"
        "2023-11-16 19:00:01.5000000,9000,10\n"
        "2023-11-16 19:00:02.0000000,50,4"
    )
    options = TraceOptions(speedup=10.0, length_scale=0.1, max_total_len=500)
    workload = trace_workload("azure", path, options, vocab_size=5000, seed=0, text=None)
    requests = list(workload.requests)
    assert workload.has_times
    assert [request.due_s for request in requests] == [0.0, pytest.approx(0.25)]
    assert [(len(request.prompt or ()), request.output_len) for request in requests] == [(10, 1), (5, 1)]
    short = trace_workload("azure", path, TraceOptions(num_requests=2), vocab_size=5000, seed=0, text=None)
    assert short.num_requests == 2


def test_prompts_share_exactly_the_blocks_that_the_trace_says(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 3]},
        {"timestamp": 3000, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 3]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    workload = trace_workload("mooncake", path, TraceOptions(), vocab_size=5000, seed=0, text=None)
    a, b, c = (list(request.prompt or ()) for request in workload.requests)
    assert (len(a), len(b)) == (1200, 1500)
    assert a[:1024] == b[:1024]
    assert a[1024:1100] != b[1024:1100]
    assert b == c
    scaled = trace_workload("mooncake", path, TraceOptions(length_scale=0.1), vocab_size=5000, seed=0, text=None)
    small_a, small_b, _ = (list(request.prompt or ()) for request in scaled.requests)
    assert (len(small_a), len(small_b)) == (120, 150)
    assert small_a[:102] == small_b[:102]


def test_burstgpt_leaves_out_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"])
        writer.writerows([[5, "m", 472, 18, 490, "c"], [6, "m", 9, 0, 9, "c"], [45, "m", 30, 3, 33, "c"]])
    found = [(row.arrival_s, *row.lengths) for row in read_burstgpt(path)]
    assert found == [(0.0, 472, 18), (40.0, 30, 3)]


@pytest.mark.parametrize("name", ["azure", "mooncake", "burstgpt"])
def test_a_file_of_another_format_is_no_trace(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n0,1\n")
    with pytest.raises(ValueError, match=r"trace\.csv"):
        trace_workload(name, path, TraceOptions(), vocab_size=5000, seed=0, text=None)


def test_conversations_are_asked_at_the_length_of_their_answers(tmp_path: Path, text: PromptText) -> None:
    def turns(*lengths: int) -> dict[str, object]:
        return {"conversations": [{"from": "x", "value": "w1 " * length} for length in lengths]}

    path = tmp_path / "sharegpt.json"
    path.write_text(
        json.dumps(
            [turns(10, 20), turns(10), turns(3, 20), turns(1500, 20), turns(30, 5), turns(9, 2)] + [turns(1000, 1500)]
        )
    )
    workload = sharegpt_workload(path, num_requests=2, output_len=None, seed=0, text=text)
    found = sorted((text.count(str(request.prompt)), request.output_len) for request in workload.requests)
    assert found == [(10, 20), (30, 5)]
    fixed = sharegpt_workload(path, num_requests=5, output_len=7, seed=0, text=text)
    requests = list(fixed.requests)
    assert len(requests) == 5
    assert {request.output_len for request in requests} == {7}
    with pytest.raises(ValueError, match="--tokenizer"):
        sharegpt_workload(path, num_requests=2, output_len=None, seed=0, text=None)


def test_the_seed_decides_which_conversations_are_asked_and_in_what_order(tmp_path: Path, text: PromptText) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"messages": [{"content": f"w{i} w1 w1 w1"}, {"content": "w1"}]} for i in range(30)]))

    def first(seed: int) -> list[object]:
        workload = sharegpt_workload(path, num_requests=8, output_len=7, seed=seed, text=text)
        return [request.prompt for request in workload.requests]

    assert first(0) == first(0) != first(1)
    assert len(set(first(0))) == 8
    assert first(0) != [f"w{i} w1 w1 w1" for i in range(8)]


def test_files_of_a_dataset_are_found_by_subset_and_split(tmp_path: Path, text: PromptText) -> None:
    for name in ("main/train.jsonl", "main/test.jsonl", "other/test.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"question": "w1 w2 w3 w4", "answer": "w1 w2 w3 w4 w5"}\n')
    (tmp_path / "other/test.csv").write_text("prompt,output\nw1 w2 w3,w4 w5 w6 w7\n")
    assert [file.name for file in hf_files(tmp_path, subset="main", split="test")] == ["test.jsonl"]

    def first(subset: str, output_len: int | None) -> LoadRequest:
        workload = hf_workload(
            tmp_path, subset=subset, split="test", num_requests=1, output_len=output_len, seed=0, text=text
        )
        return next(workload.requests)

    assert first("main", None) == LoadRequest(prompt="w1 w2 w3 w4", output_len=5)
    assert first("other", 9) == LoadRequest(prompt="w1 w2 w3", output_len=9)
    with pytest.raises(ValueError, match="split validation"):
        hf_files(tmp_path, subset=None, split="validation")
    with pytest.raises(ValueError, match="not on this machine"):
        hf_files(tmp_path / "away", subset=None, split=None)


def test_own_requests_are_taken_as_they_are_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": [5, 6], "at_s": 1.5}\n{"messages": [{"role": "user", "content": "a"}], "at_s": 2}\n')
    workload = custom_workload(path, num_requests=None, default_output_len=8)
    ids, chat = workload.requests
    assert workload.has_times
    assert (ids.prompt, ids.output_len, ids.due_s) == ([5, 6], 8, 1.5)
    assert chat.messages == [{"role": "user", "content": "a"}]
    path.write_text('{"prompt": "a", "output_tokens": 3}\n{"prompt": "a", "output": 3}\n')
    with pytest.raises(ValueError, match=r"request 2: unknown fields \['output'\]"):
        custom_workload(path, num_requests=None, default_output_len=8)
    assert not custom_workload(path, num_requests=1, default_output_len=8).has_times


@pytest.mark.parametrize("times", [(0, None), (2, 1), (-1, 0)])
def test_times_of_own_requests_are_in_order_or_not_there(tmp_path: Path, times: tuple[float | None, ...]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "at_s": at_s}) + "\n" for at_s in times))
    with pytest.raises(ValueError, match="at_s"):
        custom_workload(path, num_requests=None, default_output_len=8)
    with pytest.raises(ValueError, match="there is no file"):
        custom_workload(tmp_path / "away.jsonl", num_requests=None, default_output_len=8)
