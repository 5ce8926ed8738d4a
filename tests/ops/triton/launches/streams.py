"""Hyper-connections with the dims of DeepSeek-V4."""

import torch

from atom_cluster.ops.streams import StreamRule
from atom_cluster.ops.triton import streams

NUM, SIZE = 4, 7168
RULE = StreamRule(norm_eps=1e-6, eps=1e-6, num_iterations=20)


def around_a_block(num_tokens: int) -> None:
    before = torch.empty(num_tokens, NUM, SIZE, dtype=torch.bfloat16)
    fn, bias = torch.empty((2 + NUM) * NUM, NUM * SIZE), torch.empty((2 + NUM) * NUM)
    x, write, mix = streams.connect_streams(before, fn, torch.empty(3), bias, RULE)
    streams.write_streams(before, x, write, mix)


def join(dtype: torch.dtype) -> None:
    streams.join_streams(
        torch.empty(4, NUM, SIZE, dtype=dtype), torch.empty(NUM, NUM * SIZE), torch.empty(1), torch.empty(NUM), RULE
    )


LAUNCHES = {
    "decode": lambda: around_a_block(4),
    "prefill": lambda: around_a_block(8192),
    "join": lambda: join(torch.bfloat16),
    "join_float32": lambda: join(torch.float32),
}
