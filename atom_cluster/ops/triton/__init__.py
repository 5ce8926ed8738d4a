"""Our own kernels, in Triton, for AMD and NVIDIA GPUs. See `ops/select.py` for where they are used."""

from atom_cluster.ops.triton.activation import silu_and_mul

__all__ = ["silu_and_mul"]
