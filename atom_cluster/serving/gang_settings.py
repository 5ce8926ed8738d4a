"""From the configuration to one replica's gang: what each rank loads and what its engine serves."""

from __future__ import annotations

import dataclasses

from ray.util import get_node_ip_address

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import read_model_facts
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.engine.protocols import StepRunner
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.engine_server.host import EngineHost
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.errors import ConfigError
from atom_cluster.gang.placement import Device, world_size
from atom_cluster.gang.rank_runner import RankRunner
from atom_cluster.gang.ray_metrics import RayMetrics
from atom_cluster.gang.spec import GangSpec, ModelRanks, SimulatedRank
from atom_cluster.messages.cluster import Role
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.serving.secret import cluster_secret
from atom_cluster.structured.compiler import GrammarCompiler

_HERE = "atom_cluster.serving.gang_settings"


def gang_spec(config: ClusterConfig, reasons: dict[str, str], *, role: Role, peer_id: str) -> GangSpec:
    """The gang of one replica of a role. `config` is resolved: device, dtype and threads are no longer automatic."""
    group = config.groups()[role]
    settings = EngineHostSettings(
        peer_id=peer_id,
        role=role,
        model=config.model_options.served_name or config.model,
        scheduler=config.scheduler,
        transfer=config.kv_transfer,
        prefix_caching=config.cache.prefix_caching,
        faults=config.faults,
        load_period_s=config.router.load_period_s,
        ping_period_s=config.serving.ping_period_s,
        client_timeout_s=config.serving.client_timeout_s,
        metrics_period_s=config.observability.metrics_period_s,
        choices=reasons,
    )
    return GangSpec(
        ranks=_ranks(config, group),
        host_factory=f"{_HERE}:make_host",
        host_settings=settings,
        name=peer_id,
        log_level=config.observability.log_level,
        log_format=config.observability.log_format,
        device=device_of(group),
        resources_per_rank=group.resources_per_rank,
        start_timeout_s=config.serving.start_timeout_s,
        ping_timeout_s=config.serving.health_check_timeout_s,
    )


def device_of(group: GroupConfig) -> Device:
    """The device of a resolved group."""
    if group.device == "auto":
        raise ConfigError("the configuration has not been resolved: a group's device is still `auto`")
    return group.device


def _ranks(config: ClusterConfig, group: GroupConfig) -> ModelRanks | SimulatedRank:
    if config.simulation is not None:
        cache = config.cache.model_copy(update={"block_size": config.block_size_of(group)})
        argument = config.model_copy(update={"cache": cache})
        return SimulatedRank(factory=f"{_HERE}:make_simulated_runner", argument=argument)
    options, cache = config.model_options, config.cache
    return ModelRanks(
        num_ranks=world_size(group.parallel),
        factory=f"{_HERE}:make_rank",
        options=RunnerOptions(
            model_dir=config.model,
            revision=options.revision,
            dtype=options.dtype,
            device=device_of(group),
            divides_experts=group.parallel.expert > 1,
            block_size=config.block_size_of(group),
            num_blocks=None if cache.num_blocks == "auto" else cache.num_blocks,
            cpu_cache_gib=cache.cpu_cache_gib,
            memory_fraction=group.memory_fraction,
            max_num_requests=config.scheduler.max_num_requests,
            max_model_len=None if options.max_model_len == "auto" else options.max_model_len,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            compilation=config.compilation,
            profile=config.observability.profile,
            num_drafts=config.num_drafts,
            num_threads=None if group.threads_per_rank == "auto" else group.threads_per_rank,
            ops_backend=config.ops.backend,
            ops_overrides=config.ops.overrides,
            load_format=options.load_format,
            kv_dtype=cache.kv_dtype,
            quantization=config.quantization,
            seed=options.seed,
            kv_transport=None if config.unified is not None else config.kv_transfer.transport,
            faults=config.faults,
        ),
    )


# --- called in a rank's own process, by the dotted paths above ------------------------------------------------------


def make_rank(options: RunnerOptions) -> RankRunner:
    """A rank's model runner. `options.model_dir` may name a model that this node has yet to fetch."""
    from atom_cluster.runner.build import build_model_runner  # imports torch, which the head does without

    model_dir = resolve_model_path(options.model_dir, options.revision)
    runner = build_model_runner(dataclasses.replace(options, model_dir=str(model_dir), secret=cluster_secret()))
    runner.warm_up_grammars()
    return runner


def make_simulated_runner(config: ClusterConfig) -> StepRunner:
    """A whole runner that computes nothing."""
    if config.simulation is None:
        raise ConfigError("`simulation` is not configured")
    model_dir = resolve_model_path(config.model, config.model_options.revision)
    model = read_model_facts(model_dir)
    max_model_len = config.model_options.max_model_len
    return SimulatedRunner(
        simulation=config.simulation,
        block_size=config.cache.block_size,
        max_num_requests=config.scheduler.max_num_requests,
        max_drafts=config.num_drafts,
        grammars=GrammarCompiler.for_model(model_dir, config.simulation.vocab_size, capacity=1),
        max_model_len=model.max_positions if max_model_len == "auto" else max_model_len,
    )


def make_host(*, runner: StepRunner, settings: EngineHostSettings) -> EngineHost:
    """Rank 0's engine host, listening on this node's address."""
    settings = dataclasses.replace(settings, host=get_node_ip_address(), secret=cluster_secret())
    labels = {"role": settings.role, "replica": settings.peer_id}
    metrics = RayMetrics(labels=labels, period_s=settings.metrics_period_s)
    return EngineHost(runner=runner, settings=settings, metrics=metrics)
