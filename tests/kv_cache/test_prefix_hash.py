from __future__ import annotations

import random
import struct
import subprocess
import sys

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.kv_cache.prefix_hash import hash_block, hash_blocks, pack_tokens, seed_of

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5)
SEED = seed_of("model")

token_lists = st.lists(st.integers(0, 2**31), max_size=40)


def test_a_block_is_hashed_after_its_parent_as_little_endian_words() -> None:
    data = struct.pack("<Q4q", SEED, 3, 1, 4, 1)
    assert hash_blocks(TOKENS, 4, SEED)[0] == xxhash.xxh64_intdigest(data)


def test_hashes_are_the_same_in_every_process_and_release() -> None:
    assert hash_blocks(TOKENS, 4, SEED) == (15542233047386595165, 12504147910619630474)
    code = f"from atom_cluster.kv_cache.prefix_hash import *; print(hash_blocks({TOKENS}, 4, seed_of('model')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(hash_blocks(TOKENS, 4, SEED))


@given(token_lists, st.integers(1, 9))
def test_only_full_blocks_have_a_hash(tokens: list[int], block_size: int) -> None:
    hashes = hash_blocks(tokens, block_size, SEED)
    assert len(hashes) == len(tokens) // block_size
    assert all(0 <= prefix_hash < 2**64 for prefix_hash in hashes)


@given(token_lists, token_lists, st.integers(1, 5))
def test_hashes_are_equal_exactly_as_far_as_the_tokens_are(left: list[int], right: list[int], block_size: int) -> None:
    pairs = list(zip(hash_blocks(left, block_size, SEED), hash_blocks(right, block_size, SEED)))
    for index, (one, other) in enumerate(pairs):
        end = (index + 1) * block_size
        assert (one == other) == (left[:end] == right[:end])


@given(token_lists, st.integers(1, 5))
def test_hashing_block_by_block_gives_the_chain(tokens: list[int], block_size: int) -> None:
    parent, chain = SEED, []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = hash_block(parent, pack_tokens(tokens[start : start + block_size]))
        chain.append(parent)
    assert tuple(chain) == hash_blocks(tokens, block_size, SEED)


def test_another_fingerprint_gives_other_hashes() -> None:
    assert not set(hash_blocks(TOKENS, 4, SEED)) & set(hash_blocks(TOKENS, 4, seed_of("other model")))


@pytest.mark.parametrize("make", [tuple, list])
def test_any_sequence_of_tokens_is_hashed_alike(make: type[list[int]]) -> None:
    tokens = [random.Random(0).randrange(128_000) for _ in range(8_000)]
    assert hash_blocks(make(tokens), 16, SEED) == hash_blocks(tokens, 16, SEED)
