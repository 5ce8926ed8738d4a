"""Copies of scattered KV blocks out of peers' memory."""

import torch

from atom_cluster.kv_transfer.block_copy import BlockCopier

LAUNCHES = {"all alignments": lambda: BlockCopier(torch.device("cpu"))}
