"""Our own kernels, in Triton, for AMD and NVIDIA GPUs. See `ops/select.py` for where they are used."""

from atom_cluster.ops.triton.activation import gelu_tanh_and_mul, sigmoid_and_mul, silu_and_mul
from atom_cluster.ops.triton.attention import plan_attention
from atom_cluster.ops.triton.compilations import take_compiled, watch_compilations
from atom_cluster.ops.triton.compile_ahead import can_compile_ahead, compiling_ahead
from atom_cluster.ops.triton.compressed_attention import plan_compressed_attention
from atom_cluster.ops.triton.compression import plan_compression
from atom_cluster.ops.triton.embedding import look_up
from atom_cluster.ops.triton.gated_delta import plan_gated_delta
from atom_cluster.ops.triton.linear import prepare_linear
from atom_cluster.ops.triton.linear_quantized import prepare_quantized_linear
from atom_cluster.ops.triton.mla import plan_mla, prepare_latent_weights
from atom_cluster.ops.triton.moe import prepare_experts, prepare_quantized_experts
from atom_cluster.ops.triton.norm import add_rms_norm, gated_rms_norm, rms_norm
from atom_cluster.ops.triton.rotary import rotary
from atom_cluster.ops.triton.routing import route
from atom_cluster.ops.triton.sampling import race, sample
from atom_cluster.ops.triton.sampling_accept import accept
from atom_cluster.ops.triton.sampling_adjust import adjust
from atom_cluster.ops.triton.sampling_mask import mask
from atom_cluster.ops.triton.sparse_index import plan_index
from atom_cluster.ops.triton.step_inputs import place_tokens
from atom_cluster.ops.triton.streams import connect_streams, join_streams, write_streams

__all__ = [
    "accept",
    "add_rms_norm",
    "adjust",
    "can_compile_ahead",
    "compiling_ahead",
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
    "prepare_quantized_linear",
    "prepare_quantized_experts",
    "race",
    "rms_norm",
    "rotary",
    "route",
    "sample",
    "sigmoid_and_mul",
    "silu_and_mul",
    "take_compiled",
    "watch_compilations",
    "write_streams",
]
