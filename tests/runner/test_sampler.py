import math

import pytest
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.runner import sampler
from atom_cluster.runner.row_state import Row
from atom_cluster.runner.sampler import SampledBatch, SamplingRow

VOCAB = 40


def make_row(sampling: SamplingParams, *, seed: int = 0, ending_token_ids: tuple[int, ...] = ()) -> Row:
    return Row(sampling=sampling, seed=seed, num_prompt_tokens=1, ending_token_ids=ending_token_ids)


def sample(
    logits: torch.Tensor, rows: list[Row], *, position: int = 0, tokens: list[list[int]] | None = None
) -> SampledBatch:
    """Choose after one prompt token and `position` output tokens; `tokens` are those of each row, if they matter."""
    table = torch.tensor(tokens or [[0] * (position + 1)] * len(rows), dtype=torch.int32)
    sampling_rows = [SamplingRow(row, index, table.shape[1]) for index, row in enumerate(rows)]
    return sampler.sample(logits.clone(), sampling_rows, tokens=table)


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_temperature_zero_or_tiny_takes_the_most_likely_token(temperature: float) -> None:
    logits = random_logits(3)
    rows = [make_row(SamplingParams(temperature=temperature), seed=s) for s in range(3)]
    assert torch.equal(sample(logits, rows).token_ids, logits.argmax(-1))


def test_a_small_temperature_does_not_overflow() -> None:
    logits = random_logits(1) * 1e4
    assert sample(logits, [make_row(SamplingParams(temperature=1e-4))]).token_ids.item() == logits.argmax().item()


def test_ties_under_greedy_are_decided_the_same_in_any_batch() -> None:
    logits = torch.zeros(5, VOCAB)
    rows = [make_row(SamplingParams(temperature=0.0))] * 5
    alone = sample(logits[:1], rows[:1]).token_ids.item()
    assert sample(logits, rows).token_ids.tolist() == [alone] * 5


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (SamplingParams(), [0.4, 0.3, 0.2, 0.1]),
        (SamplingParams(temperature=0.5), [0.16, 0.09, 0.04, 0.01]),
        (SamplingParams(top_k=2), [0.4, 0.3, 0.0, 0.0]),
        (SamplingParams(top_p=0.65), [0.4, 0.3, 0.0, 0.0]),
        (SamplingParams(min_p=0.4), [0.4, 0.3, 0.2, 0.0]),
    ],
)
def test_frequencies_follow_the_distribution(
    sampling: SamplingParams, weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_draws = 20_000
    monkeypatch.setattr(sampler, "_ROWS_PER_DRAW_ON_CPU", num_draws)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(num_draws, 4)
    rows = [make_row(sampling, seed=seed) for seed in range(num_draws)]
    counts = torch.bincount(sample(logits, rows).token_ids, minlength=4).tolist()
    expected = [weight / sum(weights) * num_draws for weight in weights]
    assert all(count == 0 for count, want in zip(counts, expected) if want == 0)
    chi_square = sum((count - want) ** 2 / want for count, want in zip(counts, expected) if want > 0)
    degrees = sum(want > 0 for want in expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_successive_positions_of_one_seed_follow_the_distribution() -> None:
    logits = torch.tensor([[0.7, 0.3]]).log()
    row = make_row(SamplingParams(), seed=11)
    drawn = [sample(logits, [row], position=position).token_ids.item() for position in range(4000)]
    assert abs(sum(drawn) - 1200) < 5 * math.sqrt(4000 * 0.21)


def test_a_batch_samples_what_its_rows_sample_alone() -> None:
    samplings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=VOCAB + 5),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.05),
    ]
    rows = [make_row(sampling, seed=100 + i) for i, sampling in enumerate(samplings)]
    logits = random_logits(len(rows), seed=3)
    together = sample(logits, rows, position=4).token_ids.tolist()
    alone = [sample(logits[i : i + 1], [row], position=4).token_ids.item() for i, row in enumerate(rows)]
    assert together == alone


def test_the_draw_depends_on_seed_and_position_and_nothing_else() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, position: int) -> float:
        return sample(logits, [make_row(SamplingParams(), seed=seed)], position=position).token_ids.item()

    assert draw(1, 1) == draw(1, 1)
    assert len({draw(seed, position) for seed in range(5) for position in range(5)}) > 20


def test_endings_are_not_sampled_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 100.0
    logits[0, 9] = 50.0
    row = make_row(SamplingParams(temperature=0.0, min_tokens=2), ending_token_ids=(7, VOCAB + 3))
    assert [sample(logits, [row], position=position).token_ids.item() for position in range(4)] == [9, 9, 7, 7]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(2)
    rows = [
        make_row(SamplingParams(temperature=0.3, top_k=2, logprobs=3, min_tokens=5), ending_token_ids=(1,)),
        make_row(SamplingParams(temperature=0.0)),
    ]
    batch = sample(logits, rows)
    assert batch.logprobs is not None
    first, second = batch.logprobs.read()
    expected = logits[0].log_softmax(-1)
    assert second is None
    assert first is not None
    assert first.logprob == pytest.approx(expected[batch.token_ids[0]].item(), abs=1e-5)
    assert [top.token_id for top in first.top] == expected.topk(3).indices.tolist()
    assert [top.logprob for top in first.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_more_top_logprobs_than_tokens_gives_all_of_them() -> None:
    batch = sample(random_logits(1, vocab_size=4), [make_row(SamplingParams(logprobs=10))])
    assert batch.logprobs is not None
    (found,) = batch.logprobs.read()
    assert found is not None
    assert sum(math.exp(top.logprob) for top in found.top) == pytest.approx(1.0, abs=1e-5)


def test_penalties_of_one_row_leave_the_others_alone() -> None:
    penalized = make_row(SamplingParams(temperature=0.0, presence_penalty=2.0))
    plain = make_row(SamplingParams(temperature=0.0))
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert sample(logits, [plain, penalized], tokens=[[1, 0], [1, 0]]).token_ids.tolist() == [0, 1]


def test_greedy_and_random_rows_share_a_batch() -> None:
    logits = random_logits(3)
    rows = [
        make_row(SamplingParams(seed=1), seed=1),
        make_row(SamplingParams(temperature=0.0)),
        make_row(SamplingParams()),
    ]
    found = sample(logits, rows).token_ids.tolist()
    assert found[1] == logits[1].argmax().item()
    assert found == [sample(logits[i : i + 1], [row]).token_ids.item() for i, row in enumerate(rows)]


def test_drawing_for_many_rows_at_once_gives_what_single_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = [SamplingParams(top_k=5), SamplingParams(top_p=0.5), SamplingParams(), SamplingParams(min_p=0.2)] * 3
    rows = [make_row(sampling, seed=i) for i, sampling in enumerate(samplings)]
    logits = random_logits(len(rows))
    expected = sample(logits, rows).token_ids.tolist()
    monkeypatch.setattr(sampler, "_ROWS_PER_DRAW_ON_CPU", 5)
    assert sample(logits, rows).token_ids.tolist() == expected
