"""Gated DeltaNet, with the dims of Qwen3-Next: decode rows, rows with drafts, chunks."""

import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.gated_delta import Gates, StateMetadata
from atom_cluster.ops.triton.gated_delta import plan_gated_delta

KEY_HEADS, VALUE_HEADS, DIM = 16, 32, 128
CHANNELS, WIDTH = (2 * KEY_HEADS + VALUE_HEADS) * DIM, 4


def both(lengths: list[int], *, keeps_all: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    num_tokens, num_rows = sum(lengths), len(lengths)
    starts = [sum(lengths[:row]) for row in range(num_rows + 1)]
    rows = AttentionMetadata(
        block_size=16,
        num_decode_rows=lengths.count(1),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.zeros(num_rows, 1, dtype=torch.int32),
        slot=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(lengths),
    )
    pages = torch.zeros(num_rows, max(lengths) if keeps_all else 1, dtype=torch.int64)
    states = StateMetadata(read_page=pages[:, 0], write_page=pages, keeps_all_cpu=(keeps_all,) * num_rows)
    plan = plan_gated_delta(rows, states)
    x = torch.empty(num_tokens, CHANNELS + VALUE_HEADS * DIM, dtype=dtype)[:, :CHANNELS]
    weight, past = (torch.empty(shape, dtype=dtype) for shape in ((WIDTH, CHANNELS), (1, CHANNELS, WIDTH - 1)))
    y = plan.convolve(x, weight.T, past)
    sizes = [KEY_HEADS * DIM, KEY_HEADS * DIM, VALUE_HEADS * DIM]
    heads = [part.view(num_tokens, -1, DIM) for part in y.split(sizes, dim=1)]
    learn, decay = torch.empty(num_tokens, 2 * VALUE_HEADS, dtype=dtype).chunk(2, dim=1)
    gates = Gates(decay, learn, torch.empty(VALUE_HEADS), torch.empty(VALUE_HEADS))
    plan.delta_rule(*heads, gates, torch.empty(1, VALUE_HEADS, DIM, DIM))


LAUNCHES = {
    "decode": lambda: both([1, 1]),
    "drafts": lambda: both([3, 3], keeps_all=True),
    "prefill": lambda: both([100, 200]),
    "prefill_float32": lambda: both([100, 200], dtype=torch.float32),
}
