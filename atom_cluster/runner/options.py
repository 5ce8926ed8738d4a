"""RunnerOptions: everything one rank needs to come up, as plain values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.faults import FaultsConfig
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.config.ops import OpBackend, OpBackendChoice, OpFamily
from atom_cluster.config.quantization import QuantizationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """Options of one rank. Equal on all ranks of a gang except `rank`, `device_index` and `host`."""

    model_dir: str
    """Directory in Hugging Face layout; what makes a rank's runner may first resolve a hub id into one."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto"
    """Compute and KV precision. auto: the checkpoint's on GPUs, float32 on CPUs. float64 is meant for tests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_index: int = 0
    """Which of the GPUs that this process sees."""
    rank: int = 0
    world_size: int = 1
    divides_experts: bool = False
    """Each rank holds whole experts, instead of a part of every expert."""
    init_method: str = ""
    """Where the ranks meet, as torch.distributed spells it; unused when there is one rank."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int | None = None
    """KV blocks; None: as many as `cpu_cache_gib` or `memory_fraction` allow, the smallest over all ranks."""
    cpu_cache_gib: float = 0.5
    """KV memory on CPUs, in GiB."""
    memory_fraction: float = 0.88
    """Share of a GPU's memory for weights, activations and KV cache together."""
    max_num_requests: int = 256
    """Rows."""
    max_model_len: int | None = None
    """Most tokens of a request; None: the checkpoint's limit."""
    max_num_batched_tokens: int = 8192
    """Most tokens of one step; sizes the profiling run on GPUs."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Dtype of keys and values in the cache. auto: as computed."""
    quantization: QuantizationConfig = QuantizationConfig()
    """How weights of a float checkpoint are quantized while they are loaded."""
    compilation: CompilationConfig = CompilationConfig()
    """Graphs on GPUs."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of single steps, on demand."""
    num_drafts: int = 0
    """Tokens to draft behind each sampled one; 0: no speculation."""
    num_threads: int | None = None
    """Compute threads on CPUs; None leaves torch's choice."""
    ops_backend: OpBackendChoice = "auto"
    ops_overrides: Mapping[OpFamily, OpBackend] = field(default_factory=dict)
    """Other backends for single families of ops."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    seed: int = 0
    """Of dummy weights."""
    kv_transport: str | None = None
    """Transport for KV exchange with other engines, or auto; None: this engine exchanges none."""
    host: str = "127.0.0.1"
    """Address of this node that KV transports listen on."""
    secret: bytes = field(default=b"", repr=False)
    """The cluster's secret, for KV transports."""
    faults: FaultsConfig | None = None
    """What goes wrong on purpose with KV transports."""
