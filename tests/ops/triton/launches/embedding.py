"""Lookups of token embeddings."""

import torch

from atom_cluster.ops.triton import embedding

ROWS = torch.empty(64, 4096, dtype=torch.bfloat16)
IDS = torch.zeros(4, dtype=torch.int64)
LAUNCHES = {
    "all": lambda: embedding.look_up(ROWS, IDS, dtype=torch.bfloat16),
    "shard": lambda: embedding.look_up(ROWS, IDS, dtype=torch.float32, factor=64.0, shard=range(64, 128)),
}
