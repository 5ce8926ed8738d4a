"""The memory of every group of a configuration, on one kind of accelerator: does the model fit, and how much KV."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atom_cluster.config.accelerators import Accelerator
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.runner.memory_plan import RankMemory, RankShape, measure
from atom_cluster.units import GiB, ceil_div

_DEGREES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (2048, 8192, 32768)
"""Tokens of the requests that are counted, beside the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemory:
    """What each rank of a group has its memory for."""

    role: str
    group: GroupConfig
    memory: RankMemory
    accelerator: Accelerator | None
    """None: CPUs."""
    kv_bytes: int
    arithmetic: str
    """Where `kv_bytes` comes from."""
    num_blocks: int

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV fits on a replica."""
        return self.num_blocks * self.memory.shape.block_size


def plan_groups(
    config: ClusterConfig,
    model: HfConfig,
    accelerator: Accelerator | None,
    *,
    measured: dict[RankShape, RankMemory] | None = None,
) -> list[GroupMemory]:
    """The groups of a resolved configuration; `accelerator` is what groups on GPUs have.

    measured: ranks of this model that were measured before; those that are measured now are added.
    Raises ConfigError for a group that does not fit, with the arithmetic and the least `parallel.tensor` that would do.
    """
    measured = {} if measured is None else measured  # prefill and decode are often alike
    groups = []
    for role, group in config.groups().items():
        shape = rank_shape(config, group)
        if shape not in measured:
            measured[shape] = measure(model, shape)
        groups.append(_plan(config, role, group, model, measured[shape], accelerator))
    return groups


def _plan(
    config: ClusterConfig,
    role: str,
    group: GroupConfig,
    model: HfConfig,
    memory: RankMemory,
    accelerator: Accelerator | None,
) -> GroupMemory:
    if group.device == "cpu":
        kv_bytes, arithmetic = int(config.cache.cpu_cache_gib * GiB), f"cpu_cache_gib {config.cache.cpu_cache_gib}"
        planned, where = None, "CPUs"
    elif accelerator is None:
        raise ConfigError(f"`{role}` computes on GPUs: --accelerator says which to plan for")
    else:
        planned, where = accelerator, accelerator.name
        kv_bytes, arithmetic = memory.budget(
            device_bytes=accelerator.memory_bytes, memory_fraction=group.memory_fraction
        )
    try:
        num_blocks = memory.num_blocks(kv_bytes) if config.cache.num_blocks == "auto" else config.cache.num_blocks
        if planned is not None and memory.sizing.num_bytes(num_blocks) > kv_bytes:
            raise ConfigError(f"`cache.num_blocks` is {num_blocks}, which takes more than what is left")
    except ConfigError as error:
        advice = "" if planned is None else f". {_advice(model, memory.shape, group, planned)}"
        raise ConfigError(f"`{role}` does not fit {where}: {error} ({arithmetic}){advice}") from error
    return GroupMemory(
        role=role,
        group=group,
        memory=memory,
        accelerator=planned,
        kv_bytes=kv_bytes,
        arithmetic=arithmetic,
        num_blocks=num_blocks,
    )


def rank_shape(config: ClusterConfig, group: GroupConfig) -> RankShape:
    """What a resolved configuration says about one rank of a group."""
    options, scheduler = config.model_options, config.scheduler
    if options.dtype == "auto" or options.max_model_len == "auto":
        raise AssertionError("resolved by the caller")
    return RankShape(
        num_ranks=group.parallel.tensor,
        divides_experts=group.parallel.expert > 1,
        dtype=options.dtype,
        kv_dtype=config.cache.kv_dtype,
        max_model_len=options.max_model_len,
        block_size=config.block_size_of(group),
        max_num_requests=scheduler.max_num_requests,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        num_drafts=config.num_drafts,
        quantization=config.quantization,
    )


def _advice(model: HfConfig, shape: RankShape, group: GroupConfig, accelerator: Accelerator) -> str:
    """The least number of ranks that would do, and how many nodes that takes."""
    for num_ranks in _DEGREES:
        if num_ranks <= shape.num_ranks:
            continue
        try:
            memory = measure(model, replace(shape, num_ranks=num_ranks))
            kv_bytes, _ = memory.budget(device_bytes=accelerator.memory_bytes, memory_fraction=group.memory_fraction)
            num_tokens = memory.num_blocks(kv_bytes) * shape.block_size
        except ConfigError:
            continue
        num_nodes = ceil_div(num_ranks, accelerator.gpus_per_node)
        experts = f" and parallel.expert: {num_ranks}" if shape.divides_experts else ""
        nodes = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
        return (
            f"parallel.tensor: {num_ranks}{experts} would do, on {nodes} of {accelerator.gpus_per_node}: "
            f"{num_tokens} KV tokens"
        )
    return "no parallel.tensor up to 64 would do"


def describe_groups(groups: list[GroupMemory]) -> str:
    """A table for each group, and how many GPUs and nodes all of them take."""
    lines = [line for group in groups for line in _describe(group)]
    accelerator = next((group.accelerator for group in groups if group.accelerator is not None), None)
    if accelerator is not None:
        num_gpus = sum(group.group.max_ranks for group in groups if group.accelerator is not None)
        num_nodes = ceil_div(num_gpus, accelerator.gpus_per_node)
        nodes = f"{num_nodes} {'node' if num_nodes == 1 else 'nodes'} of {accelerator.gpus_per_node}"
        lines.append(f"in all: {num_gpus} {accelerator.name}, at least {nodes}")
    return "\n".join(lines)


def _describe(group: GroupMemory) -> list[str]:
    memory, shape, ranks = group.memory, group.memory.shape, group.group.parallel.tensor
    parts = ", ".join(f"{kind} {_gib(size)}" for kind, size in memory.weights.items())
    rows = [("weights", f"{_gib(memory.weight_bytes)} GiB: {parts}")]
    if group.accelerator is not None:
        outside = group.accelerator.memory_bytes * (1 - group.group.memory_fraction)
        rows += [
            ("runtime", f"{_gib(memory.runtime_bytes)} GiB, estimated"),
            ("largest step", f"{_gib(memory.step_bytes)} GiB, estimated, of {shape.max_num_batched_tokens} tokens"),
            ("graphs, others", f"{_gib(outside)} GiB, outside of memory_fraction {group.group.memory_fraction}"),
        ]
    rows += [
        ("KV cache", f"{_gib(group.kv_bytes)} GiB ({group.arithmetic})"),
        ("KV per token", f"{memory.kv_bytes_per_token:g} bytes"),
        ("KV tokens", f"{group.num_tokens}"),
        ("requests", ", ".join(f"{count} of {length} tokens" for length, count in requests_by_context(group).items())),
    ]
    if group.num_tokens < shape.max_model_len:
        rows.append(("note", f"max_model_len is {shape.max_model_len}: longer requests than fit are refused"))
    where = "CPUs" if group.accelerator is None else f"{group.accelerator.name}"
    head = f"{group.role}: {group.group.replicas} x {ranks} ranks on {where}; each rank:"
    return [head, *(f"  {name:<15}{text}" for name, text in rows)]


def requests_by_context(group: GroupMemory) -> dict[int, int]:
    """How many requests of so many tokens a replica runs at once."""
    longest = group.memory.shape.max_model_len
    lengths = [*(length for length in _CONTEXTS if length < longest), longest]
    return {length: group.memory.num_requests(group.num_blocks, length) for length in lengths}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GiB:.2f}"
