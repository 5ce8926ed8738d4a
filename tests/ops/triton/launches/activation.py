"""Gated activations."""

import torch

from atom_cluster.ops.triton import activation

LAUNCHES = {"silu": lambda: activation.silu_and_mul(torch.empty(4, 28672, dtype=torch.bfloat16))}
