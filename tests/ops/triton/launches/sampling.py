"""Choice of tokens: every kind of draw, of logits in both dtypes; penalties, biases, masks; acceptance of drafts."""

import torch

from atom_cluster.ops.sampling import NUM_COLUMNS, Draw, DrawnRows, SamplingTensors
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.ops.triton import sampling, sampling_accept, sampling_adjust, sampling_mask

PARAMS = SamplingTensors(
    values=torch.zeros(8, NUM_COLUMNS, dtype=torch.int32),
    endings=torch.zeros(8, 8, dtype=torch.int32),
    biases=torch.zeros(8, 4, 2, dtype=torch.int32),
)
MASKS = torch.zeros(8, 4748, dtype=torch.int32)
INDEX = torch.arange(8)
TOKENS = torch.zeros(9, 4096, dtype=torch.int32)


def choose(draw: Draw, dtype: torch.dtype) -> torch.Tensor:
    return sampling.sample(torch.empty(8, 151936, dtype=dtype), INDEX, INDEX, PARAMS, draw=draw)


def accept() -> torch.Tensor:
    rows = DrawnRows(
        row=INDEX, first_sample=INDEX, newest_position=INDEX, num_drafts=INDEX, max_drafts=3, padding_row=8
    )
    tables = RowTables(tokens=TOKENS, num_known=INDEX, pages=(), block_size=16)
    return sampling_accept.accept(torch.arange(32), rows, tables)


LAUNCHES = {
    "greedy": lambda: choose(Draw.GREEDY, torch.float32),
    "random": lambda: choose(Draw.RANDOM, torch.float32),
    "truncated": lambda: choose(Draw.TRUNCATED, torch.float32),
    "truncated_bf16": lambda: choose(Draw.TRUNCATED, torch.bfloat16),
    "shard": lambda: sampling.race(torch.empty(8, 75968), INDEX, INDEX, PARAMS, draw=Draw.RANDOM, first_token_id=75968),
    "adjust": lambda: sampling_adjust.adjust(torch.empty(8, 151936), INDEX, INDEX, PARAMS, TOKENS),
    "mask": lambda: sampling_mask.mask(torch.empty(8, 151936), MASKS, INDEX, first_token_id=0),
    "mask_bf16_shard": lambda: sampling_mask.mask(
        torch.empty(8, 75968, dtype=torch.bfloat16), MASKS, INDEX, first_token_id=75968
    ),
    "accept": accept,
}
