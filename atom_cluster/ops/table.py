"""OpTable: one typed field per op. Built once by `ops.select.select_ops`; layers call its fields and nothing else.

Every op runs under `torch.inference_mode` on tensors of the device and dtype that the table was selected for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from atom_cluster.ops.activation import GateAndMul, SigmoidAndMul
from atom_cluster.ops.attention import PlanAttention
from atom_cluster.ops.compile_ahead import CompileAhead
from atom_cluster.ops.compressed_attention import PlanCompressedAttention
from atom_cluster.ops.compression import PlanCompression
from atom_cluster.ops.embedding import LookUp
from atom_cluster.ops.gated_delta import GatedRmsNorm, PlanGatedDelta
from atom_cluster.ops.linear import PrepareLinear
from atom_cluster.ops.mla import PlanMla, PrepareLatentWeights
from atom_cluster.ops.moe import PrepareExperts, RouteTokens
from atom_cluster.ops.norm import AddRmsNorm, RmsNorm
from atom_cluster.ops.quantized import PrepareQuantizedExperts, PrepareQuantizedLinear
from atom_cluster.ops.rotary import Rotary
from atom_cluster.ops.sampling import AcceptTokens, AdjustLogits, MaskLogits, RaceTokens, SampleTokens
from atom_cluster.ops.sparse_index import PlanIndex
from atom_cluster.ops.step_inputs import PlaceTokens
from atom_cluster.ops.streams import ConnectStreams, JoinStreams, WriteStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTable:
    """The implementation chosen for each op."""

    place_tokens: PlaceTokens
    prepare_linear: PrepareLinear
    prepare_experts: PrepareExperts
    prepare_quantized_linear: PrepareQuantizedLinear
    prepare_quantized_experts: PrepareQuantizedExperts
    route: RouteTokens
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rotary: Rotary
    silu_and_mul: GateAndMul
    gelu_tanh_and_mul: GateAndMul
    sigmoid_and_mul: SigmoidAndMul
    look_up: LookUp
    plan_attention: PlanAttention
    prepare_latent_weights: PrepareLatentWeights
    plan_mla: PlanMla
    plan_index: PlanIndex
    plan_compression: PlanCompression
    plan_compressed_attention: PlanCompressedAttention
    connect_streams: ConnectStreams
    write_streams: WriteStreams
    join_streams: JoinStreams
    plan_gated_delta: PlanGatedDelta
    gated_rms_norm: GatedRmsNorm
    adjust: AdjustLogits
    mask: MaskLogits
    sample: SampleTokens
    race: RaceTokens
    accept: AcceptTokens
    float8_dtype: torch.dtype = torch.float8_e4m3fn
    """The e4m3 kind that the hardware multiplies; weights of the other kind are converted."""
    is_capturable: bool = False
    """Whether steps that only decode may be captured in graphs: no op waits for the device or asks the host how long
    contexts are. Reference ops do both."""
    take_compiled: Callable[[], tuple[tuple[str, float], ...]] = tuple
    """Kernels that had to be compiled or loaded since the last call, and the seconds that launches waited for each."""
    compile_ahead: CompileAhead | None = None
    """None: nothing is compiled, or only where it is launched."""
    choices: dict[str, str] = field(default_factory=dict)
    """Which backend each op family uses and why, such as {"ops.linear": "cpu: ..."}; shown at start-up."""
