"""Every `auto` becomes a value, once, purely, with the reason for it. Knows no torch, no Ray and no files: hardware and
model come in as plain facts. Two things cannot be known before the engines run and stay `auto`, with a reason that says
who decides: `cache.num_blocks`, but of plain models on CPUs, and `kv_transfer.transport` between hosts."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import ModelFacts, PlatformFacts
from atom_cluster.config.ops import OpBackendChoice
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.transfer import KvTransportName
from atom_cluster.errors import ConfigError
from atom_cluster.units import GiB

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}
_MIN_BLOCKS = 2

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A configuration that has been decided, and why."""

    config: ClusterConfig
    """As given, with automatic values filled in."""
    reasons: Mapping[str, str]
    """Dotted key (`cache.num_blocks`) -> why its value was chosen; only keys that were automatic."""


def resolve(config: ClusterConfig, platform: PlatformFacts, model: ModelFacts) -> ResolvedConfig:
    """Fill in automatic values. Values that were given are never changed.

    Raises ConfigError for combinations that cannot work on this hardware with this model.
    """
    return _Resolver(config, platform, model).resolve()


class _Resolver:
    """Decides key by key, in an order in which each decision needs only earlier ones."""

    def __init__(self, config: ClusterConfig, platform: PlatformFacts, model: ModelFacts) -> None:
        self._config = config
        self._platform = platform
        self._model = model
        self._reasons: dict[str, str] = {}

    def resolve(self) -> ResolvedConfig:
        config = self._config
        groups = {role: self._group(role, group) for role, group in config.groups().items()}
        devices = {group.device for group in groups.values()}
        dtype = self._dtype(devices)
        num_blocks = self._num_blocks(devices, dtype)
        max_model_len = self._max_model_len(num_blocks)
        self._check_prompts_fit_a_step(max_model_len)
        options = config.model_options.model_copy(
            update={"dtype": dtype, "max_model_len": max_model_len, "served_name": self._served_name()}
        )
        resolved = config.model_copy(
            update={
                **groups,
                "model_options": options,
                "cache": config.cache.model_copy(update={"num_blocks": num_blocks}),
                "kv_transfer": config.kv_transfer.model_copy(update={"transport": self._transport(devices)}),
                "ops": config.ops.model_copy(update={"backend": self._ops_backend(devices)}),
            }
        )
        return ResolvedConfig(resolved, self._reasons)

    def _because(self, key: str, reason: str) -> None:
        self._reasons[key] = reason

    @property
    def _is_simulated(self) -> bool:
        return self._config.simulation is not None

    def _group(self, role: str, group: GroupConfig) -> GroupConfig:
        device = self._device(role, group)
        threads = self._threads(role, group, device)
        return group.model_copy(update={"device": device, "threads_per_rank": threads})

    def _device(self, role: str, group: GroupConfig) -> Literal["cpu", "cuda"]:
        key, num_gpus = f"{role}.device", self._platform.num_gpus
        if group.device == "cuda" and num_gpus == 0:
            raise ConfigError(f"`{key}` is cuda, and the cluster has no GPU")
        if group.device != "auto":
            return group.device
        if self._is_simulated:
            self._because(key, "simulated: no device computes")
            return "cpu"
        if num_gpus == 0:
            self._because(key, "the cluster has no GPU")
            return "cpu"
        self._because(key, f"the cluster has {num_gpus} {self._platform.vendor} GPUs")
        return "cuda"

    def _threads(self, role: str, group: GroupConfig, device: str) -> int:
        if group.threads_per_rank != "auto":
            return group.threads_per_rank
        key = f"{role}.threads_per_rank"
        if device == "cuda" or self._is_simulated:
            self._because(key, "CPU threads compute nothing for this rank")
            return 1
        num_cores = self._platform.num_cores
        num_ranks = sum(other.max_ranks for other in self._config.groups().values())
        self._because(key, f"all but one of {num_cores} cores, divided by {num_ranks} ranks, at least one each")
        return max(1, (num_cores - 1) // num_ranks)

    def _dtype(self, devices: Set[str]) -> Dtype:
        given, checkpoint = self._config.model_options.dtype, self._model.dtype
        if given != "auto":
            return given
        if self._is_simulated:
            reason, dtype = "simulated: nothing is computed", "float32"
        elif "cpu" in devices:
            # All groups exchange KV, so one group on CPUs decides for the others.
            reason, dtype = "CPUs compute fastest in float32", "float32"
        elif checkpoint == "float32":
            reason, dtype = "precision of the checkpoint", "float32"
        elif checkpoint == "bfloat16":
            reason, dtype = "precision of the checkpoint", "bfloat16"
        else:
            reason, dtype = f"GPUs; the checkpoint has {checkpoint or 'no stated precision'}", "bfloat16"
        self._because("model_options.dtype", reason)
        return "float32" if dtype == "float32" else "bfloat16"

    def _num_blocks(self, devices: Set[str], dtype: Dtype) -> int | Literal["auto"]:
        cache, key = self._config.cache, "cache.num_blocks"
        if self._config.simulation is not None:
            self._because(key, "simulated: taken from `simulation.num_blocks`")
            return self._config.simulation.num_blocks
        if cache.num_blocks != "auto":
            return cache.num_blocks
        if "cuda" in devices:
            self._because(key, "each engine measures what `memory_fraction` leaves once its model is loaded")
            return "auto"
        if self._model.kv is None or self._config.num_drafts:
            self._because(key, "each engine sees what `cpu_cache_gib` holds once its model is loaded")
            return "auto"
        num_ranks = min(group.parallel.tensor for group in self._config.groups().values())
        kv_dtype = dtype if cache.kv_dtype == "auto" else cache.kv_dtype
        token_bytes = self._model.kv.bytes_per_token(element_bytes=_DTYPE_BYTES[kv_dtype], num_ranks=num_ranks)
        block_size = max(self._block_sizes())
        num_blocks = int(cache.cpu_cache_gib * GiB) // (token_bytes * block_size)
        if num_blocks < _MIN_BLOCKS:
            raise ConfigError(
                f"`cache.cpu_cache_gib` of {cache.cpu_cache_gib} holds {num_blocks} blocks of {block_size} "
                f"tokens of {token_bytes} bytes; at least {_MIN_BLOCKS} are needed"
            )
        self._because(
            key, f"{cache.cpu_cache_gib} GiB of `cpu_cache_gib` at {token_bytes} bytes per token of {kv_dtype} KV"
        )
        return num_blocks

    def _block_sizes(self) -> list[int]:
        return [self._config.block_size_of(group) for group in self._config.groups().values()]

    def _max_model_len(self, num_blocks: int | Literal["auto"]) -> int:
        given, limit = self._config.model_options.max_model_len, self._model.max_positions
        key = "model_options.max_model_len"
        # Drafting writes behind the last token.
        num_behind = max(0, self._config.num_drafts - 1)
        capacity = None if num_blocks == "auto" else num_blocks * min(self._block_sizes()) - num_behind
        if given == "auto":
            if capacity is not None and capacity < limit:
                self._because(key, f"the KV cache holds {capacity} tokens, the checkpoint's limit is {limit}")
                return capacity
            self._because(key, "limit of the checkpoint")
            return limit
        if given > limit:
            raise ConfigError(f"`{key}` is {given}, and the model was made for {limit} tokens at most")
        if capacity is not None and given > capacity:
            raise ConfigError(f"`{key}` is {given}, and the KV cache holds {capacity} tokens")
        return given

    def _check_prompts_fit_a_step(self, max_model_len: int) -> None:
        scheduler = self._config.scheduler
        if not scheduler.chunked_prefill and scheduler.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"`scheduler.chunked_prefill` is off and `scheduler.max_num_batched_tokens` is "
                f"{scheduler.max_num_batched_tokens}: prompts of up to {max_model_len} tokens would never fit a step"
            )

    def _served_name(self) -> str:
        given = self._config.model_options.served_name
        if given is not None:
            return given
        self._because("model_options.served_name", "last part of `model`")
        return self._config.model.rstrip("/").rpartition("/")[2].rpartition(":")[2]

    def _transport(self, devices: Set[str]) -> KvTransportName:
        given, key = self._config.kv_transfer.transport, "kv_transfer.transport"
        if given != "auto":
            return given
        if self._config.unified is not None:
            self._because(key, "unused: unified replicas exchange no KV")
        elif self._platform.is_single_host and "cuda" not in devices:
            self._because(key, "all replicas are on one host")
            return "shm"
        else:
            self._because(key, "decided by each pair of engines: shm or ipc on the same host, tcp otherwise")
        return "auto"

    def _ops_backend(self, devices: Set[str]) -> OpBackendChoice:
        given, key = self._config.ops.backend, "ops.backend"
        if given == "cpu" and "cuda" in devices:
            raise ConfigError(f"`{key}` is cpu, and a group computes on GPUs")
        if given != "auto":
            return given
        if self._is_simulated:
            self._because(key, "simulated: no op runs")
        elif "cuda" in devices:
            self._because(key, "each rank takes the fastest for its GPU, and says which at start")
            return "auto"
        else:
            self._because(key, "fastest on CPUs")
            return "cpu"
        return "torch"
