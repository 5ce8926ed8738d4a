import pytest

from atom_cluster.runner.profiling import largest_step


@pytest.mark.parametrize(
    ("num_requests", "model_len", "num_tokens", "expected"),
    [
        (4, 100, 50, [1, 1, 1, 47]),
        (4, 20, 50, [1, 9, 20, 20]),
        (2, 20, 50, [20, 20]),
        (8, 20, 3, [1, 1, 1]),
        (1, 20, 7, [7]),
    ],
)
def test_the_largest_step_uses_all_rows_and_tokens_it_can(
    num_requests: int, model_len: int, num_tokens: int, expected: list[int]
) -> None:
    found = largest_step(max_num_requests=num_requests, max_model_len=model_len, max_num_batched_tokens=num_tokens)
    assert found == expected
