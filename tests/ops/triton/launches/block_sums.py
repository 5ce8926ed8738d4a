"""Sums over KV blocks that tags are made of."""

from collections.abc import Callable

import torch

from atom_cluster.kv_transfer.block_sums import block_sums


def sums(num_words: int, *, has_places: bool = False) -> Callable[[], object]:
    def launch() -> object:
        words = torch.empty(9, num_words, dtype=torch.int64)
        numbers = torch.zeros(num_words, dtype=torch.int64)
        return block_sums(words, numbers[:7], numbers, numbers if has_places else None)

    return launch


LAUNCHES = {"2 MiB": sums(1 << 18), "odd words": sums(25), "parts": sums(1 << 17, has_places=True)}
