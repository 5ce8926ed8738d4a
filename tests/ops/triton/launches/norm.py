"""RMS norms: of the hidden state, of heads, wide, gated."""

import torch

from atom_cluster.ops.triton import norm


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


LAUNCHES = {
    "hidden": lambda: norm.add_rms_norm(empty(1, 4096), empty(1, 4096), empty(4096), 1e-5),
    "odd_hidden": lambda: norm.rms_norm(empty(8192, 7168), empty(7168), 1e-5),
    "wide": lambda: norm.rms_norm(empty(8, 4096), empty(4096, dtype=torch.float32), 1e-5),
    "heads": lambda: norm.rms_norm(empty(8192, 48, 128)[:, :32], empty(128), 1e-5),
    "gated": lambda: norm.gated_rms_norm(empty(64, 32, 128), empty(64, 48, 128)[:, :32], empty(128), 1e-5),
}
