"""Gates: activations of MLPs, and sigmoids."""

import torch

from atom_cluster.ops.triton import activation


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


LAUNCHES = {
    "silu": lambda: activation.silu_and_mul(empty(4, 28672)),
    "silu_clamped": lambda: activation.silu_and_mul(empty(4, 4096), limit=10.0),
    "gelu": lambda: activation.gelu_tanh_and_mul(empty(4, 30720)),
    "gated_heads": lambda: activation.sigmoid_and_mul(empty(4, 16, 256), empty(4, 16, 512)[..., 256:]),
    "gated_sum": lambda: activation.sigmoid_and_mul(empty(4, 2048), empty(4, 1), empty(4, 2048)),
}
