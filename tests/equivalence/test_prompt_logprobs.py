"""Log probabilities of prompts: what transformers computes, however the prompt is cut, cached, preempted or split."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from atom_cluster import SamplingParams
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import PromptScore
from atom_cluster.messages.steps import NewRow, PromptScores, RowStep, StepPlan
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import PREEMPTIONS
from tests.draft_models import draft_model_dir
from tests.equivalence.generation import make_engine
from tests.equivalence.test_tensor_parallel import Model, open_gang
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, random_tokens, tiny_model_dir

FAMILIES = ("llama", "gemma3", "qwen3_next", "deepseek_v3", "gpt_oss")
PROMPTS = [random_tokens(length, seed=length) for length in (1, 2, 17, 61)]
SCORED = SamplingParams(prompt_logprobs=3, max_tokens=4, temperature=0.0, ignore_eos=True)
Scores = list[PromptScore | None]


def scores_of(
    model: str, prompts: list[list[int]] = PROMPTS, sampling: SamplingParams = SCORED, **options: object
) -> list[Scores]:
    with make_engine(model, **options) as engine:
        outputs = engine.generate(prompts, sampling)
    return [output["prompt_logprobs"] for output in outputs]


def assert_close(found: list[Scores], expected: list[Scores], tolerance: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one[0] is None and other[0] is None and len(one) == len(other)
        for score, wanted in zip(one[1:], other[1:]):
            assert score is not None and wanted is not None
            assert score.logprob == pytest.approx(wanted.logprob, abs=tolerance)
            assert score.rank == wanted.rank
            assert [top.token_id for top in score.top] == [top.token_id for top in wanted.top]
            assert [top.logprob for top in score.top] == pytest.approx([t.logprob for t in wanted.top], abs=tolerance)


@pytest.mark.parametrize("model", FAMILIES)
def test_scores_are_those_of_transformers(model: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir(model), dtype=torch.float32).eval()
    found = scores_of(model, dtype="float32")
    tolerance = 10 * TINY_MODELS[model].tolerance
    for prompt, scores in zip(PROMPTS, found):
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), dim=-1)
        assert scores[0] is None and len(scores) == len(prompt)
        for position, score in enumerate(scores[1:], 1):
            assert score is not None
            row = expected[position - 1]
            assert score.logprob == pytest.approx(float(row[prompt[position]]), abs=tolerance)
            assert score.rank in range(
                1 + int((row > row[prompt[position]] + tolerance).sum()),
                1 + int((row > row[prompt[position]] - tolerance).sum()),  # itself included
            )
            assert [top.logprob for top in score.top] == pytest.approx(row.topk(3).values.tolist(), abs=tolerance)
            for top in score.top:
                assert float(row[top.token_id]) == pytest.approx(top.logprob, abs=tolerance)


@pytest.mark.parametrize("model", ["llama", "gemma3", "qwen3_next"])
def test_chunks_of_any_size_give_the_scores_of_a_whole_prompt(model: str) -> None:
    whole = scores_of(model)
    for num_tokens in (1, 7, 16, 40):
        assert_close(scores_of(model, max_num_batched_tokens=num_tokens), whole)


def test_a_prompt_that_is_cached_is_computed_for_its_scores_and_kept_for_others() -> None:
    with make_engine("llama") as engine:
        plain = SamplingParams(max_tokens=1, temperature=0.0)
        engine.generate([PROMPTS[3]], plain)
        warm = engine.generate([PROMPTS[3]], SCORED)[0]
        after = engine.generate([PROMPTS[3]], plain)[0]
    assert_close([warm["prompt_logprobs"]], scores_of("llama", [PROMPTS[3]], prefix_caching=False))
    assert warm["num_cached_tokens"] == 0 and after["num_cached_tokens"] == 56
    assert "prompt_logprobs" not in after


def test_preempted_requests_have_the_scores_of_undisturbed_ones() -> None:
    prompts = [random_tokens(40 + 3 * i, seed=i) for i in range(6)]
    sampling = SamplingParams(prompt_logprobs=3, max_tokens=40, temperature=0.0, ignore_eos=True)
    metrics = MemoryMetrics()
    disturbed = scores_of("llama", prompts, sampling, num_blocks=18, max_num_batched_tokens=16, metrics=metrics)
    assert metrics.value(PREEMPTIONS) > 0
    assert_close(disturbed, scores_of("llama", prompts, sampling))


def test_speculation_changes_no_score() -> None:
    directory = draft_model_dir("deepseek_v3")
    with make_engine_at(directory, speculative=SpeculativeConfig(num_tokens=2)) as engine:
        drafted = [output["prompt_logprobs"] for output in engine.generate(PROMPTS, SCORED)]
    with make_engine_at(directory) as engine:
        plain = [output["prompt_logprobs"] for output in engine.generate(PROMPTS, SCORED)]
    assert_close(drafted, plain)


def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    model = Model(tiny_model_dir("llama"), "float64")
    alone = run_plans(model, 1, tmp_path / "alone")
    both = run_plans(model, 2, tmp_path / "both")
    assert [(part.row, part.start, len(part.scores)) for part in both] == [(0, 0, 16), (1, 0, 20), (1, 20, 12)]
    expected: list[Scores] = [[None, *part.scores] for part in alone]
    assert_close([[None, *part.scores] for part in both], expected)


def test_without_output_a_prompt_as_long_as_the_context_is_scored() -> None:
    prompt = random_tokens(256, seed=5)
    only_scores = SamplingParams(prompt_logprobs=0, max_tokens=0)
    with make_engine("llama", max_num_batched_tokens=100) as engine:
        output = engine.generate([prompt], only_scores)[0]
        with pytest.raises(InvalidRequest) as refused:
            engine.generate([prompt], SamplingParams(max_tokens=0))
    assert refused.value.param == "max_tokens"
    assert (output["token_ids"], output["finish_reason"]) == ([], "length")
    assert len(output["prompt_logprobs"]) == 256
    assert all(score is not None and not score.top for score in output["prompt_logprobs"][1:])


def test_as_many_alternatives_as_there_are_tokens_sum_to_one() -> None:
    wanted = SamplingParams(prompt_logprobs=10 * VOCAB_SIZE, max_tokens=0)
    for score in scores_of("llama", [PROMPTS[2]], wanted)[0][1:]:
        assert score is not None and len(score.top) == VOCAB_SIZE
        assert float(torch.tensor([top.logprob for top in score.top]).exp().sum()) == pytest.approx(1.0, abs=1e-5)
        assert score.top[score.rank - 1].logprob == pytest.approx(score.logprob)


def make_engine_at(directory: Path, **options: object):
    from atom_cluster import LLMEngine

    settings = {"dtype": "float64", "device": "cpu", "block_size": 8, "num_blocks": 128, "num_threads": 1}
    return LLMEngine(directory, max_num_requests=16, max_model_len=256, **settings, **options)  # type: ignore[arg-type]


def run_plans(model: Model, world_size: int, meeting_point: Path) -> list[PromptScores]:
    """A whole prompt beside one in two chunks."""
    prompts = [tuple(random_tokens(length, seed=length)) for length in (17, 33)]
    rows = tuple(
        NewRow(
            row=row,
            request_id=f"request-{row}",
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            pages=(tuple(range(10 * row, 10 * row + 10)),),
            sampling=SamplingParams(seed=0, prompt_logprobs=3),
        )
        for row, prompt in enumerate(prompts)
    )
    plans = [
        StepPlan(step_id=0, new_rows=rows, rows=(RowStep(0, 0, 17, samples=True), RowStep(1, 0, 20, samples=False))),
        StepPlan(step_id=1, rows=(RowStep(0, 17, 1, samples=True), RowStep(1, 20, 13, samples=True))),
    ]
    runner = open_gang(model, world_size, meeting_point)
    try:
        scores: list[PromptScores] = []
        for plan in plans:
            runner.submit(plan)
            result = runner.collect()
            assert result is not None
            scores += result.prompt_scores
        return scores
    finally:
        runner.close()
        for child in multiprocessing.active_children():
            child.join(10.0)
