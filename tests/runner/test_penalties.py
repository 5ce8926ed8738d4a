import pytest
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.runner.penalties import has_penalties, penalize

LOGITS = [4.0, -9.0, 2.5, -1.0]


def penalized(sampling: SamplingParams, *, prompt: list[int], output: list[int]) -> list[float]:
    logits = torch.tensor(LOGITS)
    penalize(logits, torch.tensor([*prompt, *output], dtype=torch.int32), len(prompt), sampling)
    found: list[float] = logits.tolist()
    return found


def test_repetition_divides_positive_and_multiplies_negative_logits_of_all_tokens_seen() -> None:
    assert penalized(SamplingParams(repetition_penalty=2.0), prompt=[0, 0], output=[3]) == [2.0, -9.0, 2.5, -2.0]


def test_presence_counts_output_once() -> None:
    assert penalized(SamplingParams(presence_penalty=0.5), prompt=[0], output=[2, 2]) == [4.0, -9.0, 2.0, -1.0]


def test_frequency_counts_every_occurrence_in_the_output() -> None:
    assert penalized(SamplingParams(frequency_penalty=0.5), prompt=[0], output=[2, 1, 2]) == [4.0, -9.5, 1.5, -1.0]


def test_all_three_apply_in_order() -> None:
    sampling = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert penalized(sampling, prompt=[0], output=[3, 3]) == [2.0, -9.0, 2.5, -1.0 * 2 - 2 * 0.25 - 0.5]


def test_without_output_only_repetition_acts() -> None:
    assert penalized(SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), prompt=[0], output=[]) == LOGITS


def test_masked_tokens_stay_masked() -> None:
    logits = torch.tensor([float("-inf"), 1.0])
    penalize(logits, torch.tensor([0]), 1, SamplingParams(repetition_penalty=0.5, presence_penalty=-2.0))
    assert logits[0] == float("-inf")


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_counts(name: str) -> None:
    assert has_penalties(SamplingParams(**{name: 0.5}))
    assert not has_penalties(SamplingParams())
