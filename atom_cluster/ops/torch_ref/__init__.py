"""Reference implementation of every op in plain torch: any device, any float dtype, clarity over speed."""

from atom_cluster.ops.torch_ref.activation import gelu_tanh_and_mul, silu_and_mul
from atom_cluster.ops.torch_ref.attention import plan_attention
from atom_cluster.ops.torch_ref.linear import prepare_linear
from atom_cluster.ops.torch_ref.moe import prepare_experts
from atom_cluster.ops.torch_ref.norm import add_rms_norm, rms_norm
from atom_cluster.ops.torch_ref.rotary import rotary

__all__ = [
    "add_rms_norm",
    "gelu_tanh_and_mul",
    "plan_attention",
    "prepare_experts",
    "prepare_linear",
    "rms_norm",
    "rotary",
    "silu_and_mul",
]
