import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.ops.torch_ref.noise import exponential_noise, noise_keys, seed_words


def keys_of(*draws: tuple[int, int]) -> torch.Tensor:
    """Keys of draws given as (seed, position), [R, 2]."""
    seeds = torch.tensor([seed_words(seed) for seed, _ in draws], dtype=torch.int32)
    return noise_keys(seeds, torch.tensor([position for _, position in draws], dtype=torch.int32))


def token_ids(num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens, dtype=torch.int32)


def mixed(x: int) -> int:
    x %= 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_noise_of_a_row_does_not_depend_on_the_other_rows() -> None:
    keys = keys_of((1, 0), (2, 5), (3, 9))
    together = exponential_noise(keys, token_ids(1000))
    for key, row in zip(keys, together):
        assert torch.equal(exponential_noise(key[None], token_ids(1000))[0], row)


def test_noise_of_a_token_does_not_depend_on_the_other_tokens() -> None:
    keys = keys_of((1, 2), (3, 4))
    chosen = torch.tensor([[5, 900, 17], [3, 5, 0]], dtype=torch.int32)
    everything = exponential_noise(keys, token_ids(1000))
    assert torch.equal(exponential_noise(keys, chosen), everything.gather(-1, chosen.long()))


def test_noise_equals_its_definition_in_plain_integers() -> None:
    first, second = (word % 2**32 for word in seed_words(42))
    low = mixed(first + 7 * 0x9E3779B1)
    high = mixed(low + second)
    assert [key % 2**32 for key in keys_of((42, 7))[0].tolist()] == [low, high]
    found = exponential_noise(keys_of((42, 7)), token_ids(1000))[0].tolist()
    for token_id, value in enumerate(found):
        x = (token_id * 0x9E3779B1 + low) & 0xFFFFFFFF
        x = ((x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF) ^ high
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        uniform = ((x ^ x >> 16) & 0x7FFFFFFF) + 0.5
        assert value == pytest.approx(-math.log1p(-uniform / 2**31), rel=1e-4)


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31 - 1))
def test_any_seed_and_position_give_valid_keys_and_positive_noise(seed: int, position: int) -> None:
    noise = exponential_noise(keys_of((seed, position)), token_ids(64))
    assert bool((noise > 0).all())


def test_noise_is_exponentially_distributed_over_tokens_and_over_positions() -> None:
    over_tokens = exponential_noise(keys_of((1, 0)), token_ids(200_000))[0]
    over_positions = exponential_noise(keys_of(*((1, p) for p in range(200_000))), token_ids(1))[:, 0]
    over_seeds = exponential_noise(keys_of(*((s, 3) for s in range(200_000))), token_ids(2))[:, 1]
    for sample in (over_tokens, over_positions, over_seeds):
        counts = torch.histc(1.0 - torch.exp(-sample), bins=100, min=0.0, max=1.0)
        chi_square = float(((counts - 2000) ** 2 / 2000).sum())
        assert abs(chi_square - 99) < 4 * math.sqrt(2 * 99)


def test_noise_of_neighbouring_positions_is_uncorrelated_at_every_shift() -> None:
    uniform = [1.0 - torch.exp(-exponential_noise(keys_of((5, p)), token_ids(20_000))[0]) - 0.5 for p in range(3)]
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        for shift in range(-3, 4):
            correlation = float((uniform[a] * uniform[b].roll(shift)).mean()) * 12
            assert abs(correlation) < 5 / math.sqrt(20_000)


def test_words_of_a_seed_equal_their_definition() -> None:
    value = (42 + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    value ^= value >> 31
    assert [word % 2**32 for word in seed_words(42)] == [value % 2**32, value >> 32]


def test_no_two_positions_of_a_seed_share_a_word() -> None:
    keys = keys_of(*((3, p) for p in range(50_000)))
    assert all(len(column.unique()) == len(keys) for column in keys.unbind(1))
