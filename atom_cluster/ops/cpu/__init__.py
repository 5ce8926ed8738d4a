"""Op backend for CPUs: packed half-precision weights with float32 arithmetic, few tensor ops per layer."""

from atom_cluster.ops.cpu.activation import silu_and_mul
from atom_cluster.ops.cpu.attention import attention_planner
from atom_cluster.ops.cpu.gated_delta import gated_rms_norm, plan_gated_delta
from atom_cluster.ops.cpu.linear import can_pack, prepare_linear
from atom_cluster.ops.cpu.mla import mla_planner
from atom_cluster.ops.cpu.moe import prepare_experts
from atom_cluster.ops.cpu.norm import add_rms_norm, rms_norm
from atom_cluster.ops.cpu.rotary import rotary
from atom_cluster.ops.cpu.sampling import adjust, sample

__all__ = [
    "add_rms_norm",
    "adjust",
    "attention_planner",
    "can_pack",
    "gated_rms_norm",
    "mla_planner",
    "plan_gated_delta",
    "prepare_experts",
    "prepare_linear",
    "rms_norm",
    "rotary",
    "sample",
    "silu_and_mul",
]
