"""Op backend for CPUs: packed half-precision weights with float32 arithmetic, few tensor ops per layer."""

from atom_cluster.ops.cpu.activation import silu_and_mul
from atom_cluster.ops.cpu.attention import attention_planner
from atom_cluster.ops.cpu.linear import can_pack, prepare_linear
from atom_cluster.ops.cpu.norm import add_rms_norm, rms_norm
from atom_cluster.ops.cpu.rotary import rotary

__all__ = ["add_rms_norm", "attention_planner", "can_pack", "prepare_linear", "rms_norm", "rotary", "silu_and_mul"]
