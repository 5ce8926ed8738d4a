"""Stop 2 of 14: ingress, router and groups are wired into one Serve application. Next: atom_cluster/api/routes.py.

The only place that names Serve's options. Automatic values of the configuration are decided here, once, and what was
decided is what every process gets.
"""

from __future__ import annotations

import logging

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import read_model_facts
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.parallel import GroupConfig, ParallelConfig
from atom_cluster.config.resolve import ResolvedConfig, resolve
from atom_cluster.gang.placement import HEAD_CPUS, bundles, strategy
from atom_cluster.serving.autoscaling import serve_autoscaling
from atom_cluster.serving.gang_settings import device_of
from atom_cluster.serving.ingress import Ingress
from atom_cluster.serving.platform_facts import cluster_facts
from atom_cluster.serving.replica import EngineReplica
from atom_cluster.serving.router import Router

logger = logging.getLogger(__name__)

_INGRESS_GRACE_S = 60.0
"""An ingress that is to stop has at least so long for its answers."""
_SPARE_HTTP_REQUESTS = 2048
"""That Serve lets into an ingress besides those it may answer at the same time: to be refused, and health checks. What
Serve holds back itself waits without a word and without a bound."""
_MAX_ANNOUNCEMENTS = 4096
"""That the router takes at the same time; Serve's own default of a few would hold back."""
_LIGHT = {"num_cpus": HEAD_CPUS}
"""Ray resources of processes that compute nothing: Serve's default of a CPU each would not fit on a laptop."""


def build_cluster(config: ClusterConfig) -> Application:
    """The Serve application of a cluster. Raises `ConfigError` for what cannot work, before anything starts."""
    resolved = resolve_cluster(config)
    for key, reason in resolved.reasons.items():
        logger.info("chosen: %s, because: %s", key, reason)
    decided, reasons = resolved.config, dict(resolved.reasons)
    serving = decided.serving
    router = serve.deployment(Router).options(
        name="Router",
        num_replicas=1,
        max_ongoing_requests=_MAX_ANNOUNCEMENTS,
        health_check_period_s=serving.health_check_period_s,
        health_check_timeout_s=serving.health_check_timeout_s,
        logging_config=_logging(decided),
        ray_actor_options=_LIGHT,
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=serving.ingress_replicas,
        max_ongoing_requests=decided.api.protection.max_open_requests + _SPARE_HTTP_REQUESTS,
        health_check_period_s=serving.health_check_period_s,
        health_check_timeout_s=serving.health_check_timeout_s,
        # Nobody else holds the connections of its clients, who may have to wait for engines that are replaced together
        # with it; but one that stands still holds them, too, for so long.
        graceful_shutdown_timeout_s=max(_INGRESS_GRACE_S, serving.drain_timeout_s),
        # It takes no device: another one can always be started before it is stopped.
        max_surge_percent=100,
        logging_config=_logging(decided),
        ray_actor_options=_LIGHT,
    )
    router_node = router.bind(decided)
    groups = [
        _group(decided, reasons, role, group).bind(decided, reasons, role, router_node)
        for role, group in decided.groups().items()
    ]
    return ingress.bind(decided, reasons, router_node, *groups)


def resolve_cluster(config: ClusterConfig) -> ResolvedConfig:
    """Decide automatic values for the Ray cluster that this process is connected to."""
    model_dir = resolve_model_path(config.model, config.model_options.revision)
    return resolve(config, cluster_facts(), read_model_facts(model_dir))


def _group(config: ClusterConfig, reasons: dict[str, str], role: str, group: GroupConfig) -> serve.Deployment:
    device = device_of(group)
    # A simulated runner stands for all ranks of its replica.
    parallel = group.parallel if config.simulation is None else ParallelConfig()
    options: dict[str, object] = {"num_replicas": group.replicas}
    if group.autoscaling is not None:
        options = {"autoscaling_config": serve_autoscaling(group.autoscaling)}
    return serve.deployment(EngineReplica).options(
        name=role.capitalize(),
        health_check_period_s=config.serving.health_check_period_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.serving.drain_timeout_s + 30.0,
        logging_config=_logging(config),
        ray_actor_options=_LIGHT,
        placement_group_bundles=bundles(parallel, device, group.resources_per_rank),
        placement_group_strategy=strategy(parallel, device),
        **options,
    )


def _logging(config: ClusterConfig) -> LoggingConfig:
    # Serve's access log would name every announcement, twice a second and member.
    observability = config.observability
    encoding = "JSON" if observability.log_format == "json" else "TEXT"
    return LoggingConfig(encoding=encoding, log_level=observability.log_level, enable_access_log=False)
