"""Reference implementation of every op in plain torch: any device, any float dtype, clarity over speed."""

from atom_cluster.ops.torch_ref.activation import gelu_tanh_and_mul, sigmoid_and_mul, silu_and_mul
from atom_cluster.ops.torch_ref.attention import plan_attention
from atom_cluster.ops.torch_ref.compressed_attention import plan_compressed_attention
from atom_cluster.ops.torch_ref.compression import plan_compression
from atom_cluster.ops.torch_ref.embedding import look_up
from atom_cluster.ops.torch_ref.gated_delta import gated_rms_norm, plan_gated_delta
from atom_cluster.ops.torch_ref.linear import prepare_linear
from atom_cluster.ops.torch_ref.mla import plan_mla, prepare_latent_weights
from atom_cluster.ops.torch_ref.moe import prepare_experts
from atom_cluster.ops.torch_ref.norm import add_rms_norm, rms_norm
from atom_cluster.ops.torch_ref.quantized import prepare_quantized_linear
from atom_cluster.ops.torch_ref.quantized_moe import prepare_quantized_experts
from atom_cluster.ops.torch_ref.rotary import rotary
from atom_cluster.ops.torch_ref.routing import route
from atom_cluster.ops.torch_ref.sampling import accept, adjust, mask, race, sample
from atom_cluster.ops.torch_ref.sparse_index import plan_index
from atom_cluster.ops.torch_ref.step_inputs import place_tokens
from atom_cluster.ops.torch_ref.streams import connect_streams, join_streams, write_streams

__all__ = [
    "accept",
    "add_rms_norm",
    "adjust",
    "connect_streams",
    "gated_rms_norm",
    "gelu_tanh_and_mul",
    "join_streams",
    "look_up",
    "mask",
    "place_tokens",
    "plan_attention",
    "plan_compressed_attention",
    "plan_compression",
    "plan_gated_delta",
    "plan_index",
    "plan_mla",
    "prepare_experts",
    "prepare_latent_weights",
    "prepare_linear",
    "prepare_quantized_experts",
    "prepare_quantized_linear",
    "race",
    "rms_norm",
    "rotary",
    "route",
    "sample",
    "sigmoid_and_mul",
    "silu_and_mul",
    "write_streams",
]
