"""Copies of scattered KV blocks out of peers' memory."""

from collections.abc import Callable

import torch

from atom_cluster.kv_transfer.block_copy import copy_blocks


def copy(block_bytes: int, alignment: int) -> Callable[[], None]:
    return lambda: copy_blocks(torch.empty(2, 77, dtype=torch.int64), block_bytes, alignment)


LAUNCHES = {"64 KiB": copy(65536, 16), "whole words": copy(4104, 8), "odd bytes": copy(37, 1)}
