"""Weighted word sums of many scattered blocks in one pass over them: what tags are made of. Knows no epochs or regions.

Tags are computed beside forward passes, on both sides of a hand-over, so they should take little of the memory's time:
each word is read once, and nothing is written but the sums. They are exact modulo 2^64, in whatever order programs add
their parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.units import ceil_div

_CHUNK_WORDS = 1024
_NUM_WARPS = 4
_ENOUGH_PROGRAMS = 2048
"""To have loads under way on all multiprocessors of any GPU, several times over."""


def block_sums(
    words: torch.Tensor, block_ids: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """`sum(word[i] * weight[i])` of these blocks, int64 [len(block_ids)], wrapping modulo 2^64; on the current stream.

    words: int64 [num_blocks, words of a block], whose rows may be further apart. block_ids: int64, within.
    weights: int64, at least as many as there are words. places: int64; word i is at `places[i]` of a block, not at i.
    """
    num_words = words.shape[1] if places is None else len(places)
    sums = torch.zeros(len(block_ids), dtype=torch.int64, device=words.device)
    num_parts = min(ceil_div(_ENOUGH_PROGRAMS, len(block_ids)), ceil_div(num_words, _CHUNK_WORDS))
    unit = 2 if (words.data_ptr() % 16, words.stride(0) % 2, num_words % 2) == (0, 0, 0) else 1
    _sum_kernel[(len(block_ids) * num_parts,)](
        words,
        block_ids,
        weights,
        weights if places is None else places,
        sums,
        words.stride(0) // unit,
        num_words // unit,
        num_parts,
        UNIT=unit,
        HAS_PLACES=places is not None,
        CHUNK=_CHUNK_WORDS,
        num_warps=_NUM_WARPS,
    )
    return sums


def compile_sums(device: torch.device) -> None:
    """Compile everything that `block_sums` can need, or find it compiled, and wait for it."""
    words = torch.zeros(1, 4, dtype=torch.int64, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    for num_words in (2, 1):
        for places in (None, words[0]):
            block_sums(words[:, :num_words], ids, words[0], None if places is None else places[:num_words])
    ids.cpu()


# Not specialized, so that a hand-over never waits for a compiler.
@triton.jit(do_not_specialize=["stride_units", "num_units", "num_parts"])
def _sum_kernel(
    words_ptr,
    block_ids_ptr,
    weights_ptr,
    places_ptr,
    sums_ptr,
    stride_units,
    num_units,
    num_parts,
    UNIT: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a block's words from its part on, every `num_parts` chunks. Units tell what is aligned."""
    index = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    block = tl.load(block_ids_ptr + index)
    row = words_ptr + block * stride_units.to(tl.int64) * UNIT
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(part * CHUNK, num_units * UNIT, num_parts * CHUNK):
        word = start + tl.arange(0, CHUNK)
        is_inside = word < num_units * UNIT
        if HAS_PLACES:
            at = tl.load(places_ptr + word, is_inside, other=0)
        else:
            at = word
        total += tl.load(row + at, is_inside, other=0) * tl.load(weights_ptr + word, is_inside, other=0)
    tl.atomic_add(sums_ptr + index, tl.sum(total), sem="relaxed")
