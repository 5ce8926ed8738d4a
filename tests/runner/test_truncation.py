import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.runner import truncation
from atom_cluster.runner.truncation import truncate

PROBABILITIES = [0.5, 0.2, 0.15, 0.1, 0.05]


def kept_per_row(logits: torch.Tensor, *, top_k: list[int], top_p: list[float]) -> list[list[int]]:
    values, token_ids = truncate(logits, top_k=top_k, top_p=top_p)
    for row, (row_values, row_ids) in enumerate(zip(values, token_ids)):
        stays = row_values > float("-inf")
        assert torch.equal(row_values[stays], logits[row, row_ids[stays].long()])
    return [sorted(ids[row > float("-inf")].tolist()) for row, ids in zip(values, token_ids)]


def kept(*, top_k: int = 0, top_p: float = 1.0, probabilities: list[float] = PROBABILITIES) -> list[int]:
    return kept_per_row(torch.tensor([probabilities]).log(), top_k=[top_k], top_p=[top_p])[0]


@pytest.mark.parametrize(("top_k", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_most_likely(top_k: int, expected: list[int]) -> None:
    assert kept(top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"), [(1e-9, [0]), (0.49, [0]), (0.51, [0, 1]), (0.71, [0, 1, 2]), (0.999, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, expected: list[int]) -> None:
    assert kept(top_p=top_p) == expected


def test_top_p_counts_only_what_top_k_left() -> None:
    # Of the two tokens that top-k leaves, the first has 0.5 / 0.7 = 0.714 of the mass.
    assert kept(top_k=2, top_p=0.71) == [0]
    assert kept(top_k=2, top_p=0.72) == [0, 1]


def test_of_tokens_that_tie_top_k_keeps_exactly_k() -> None:
    assert len(kept(top_k=2, probabilities=[0.25, 0.25, 0.25, 0.25])) == 2


def test_rows_are_truncated_each_by_its_own_values() -> None:
    logits = torch.tensor([PROBABILITIES] * 3).log()
    assert kept_per_row(logits, top_k=[4, 2, 0], top_p=[1.0, 1.0, 0.6]) == [[0, 1, 2, 3], [0, 1], [0, 1]]


def test_masked_tokens_never_come_back() -> None:
    logits = torch.tensor([PROBABILITIES]).log()
    logits[0, 1:] = float("-inf")
    assert kept_per_row(logits, top_k=[3], top_p=[0.99]) == [[0]]
    assert kept_per_row(logits, top_k=[0], top_p=[0.99]) == [[0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), top_p=st.floats(0.01, 0.999), spread=st.sampled_from([0.01, 1.0, 8.0]))
def test_top_p_over_few_candidates_equals_a_full_sort(seed: int, top_p: float, spread: float) -> None:
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(seed)) * spread
    ordered = logits.sort(descending=True)
    mass = ordered.values.double().softmax(-1)
    expected_counts = (mass.cumsum(-1) - mass < top_p).sum(-1).tolist()
    for row, expected in enumerate(expected_counts):
        (found,) = kept_per_row(logits[row : row + 1], top_k=[0], top_p=[top_p])
        # Rounding of the mass may move the boundary by a little.
        assert abs(len(found) - expected) <= 1 + expected * 1e-4
        assert set(found) <= set(ordered.indices[row, : len(found)].tolist())


def test_the_number_of_candidates_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    expected = kept_per_row(logits, top_k=[0, 0, 7], top_p=[0.3, 0.9, 1.0])
    monkeypatch.setattr(truncation, "_FIRST_CANDIDATES", 1)
    assert kept_per_row(logits, top_k=[0, 0, 7], top_p=[0.3, 0.9, 1.0]) == expected
    assert [len(row) for row in expected][2] == 7
