"""The Serve application that a configuration becomes, looked at before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve import Application, Deployment

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import PlatformFacts
from atom_cluster.config.load import load_args
from atom_cluster.errors import ConfigError
from atom_cluster.serving import builders
from atom_cluster.serving.builders import build_cluster

CPUS = PlatformFacts(vendor="cpu", num_gpus=0, num_cores=4, is_single_host=True)
GPUS = PlatformFacts(vendor="rocm", num_gpus=64, num_cores=64, is_single_host=False)


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "cluster_facts", lambda: CPUS)


def build(model_dir: Path, **args: object) -> dict[str, Deployment]:
    """Deployments by name."""
    application = build_cluster(load_args({"model": str(model_dir), **args}))
    found = {application._bound_deployment.name: application._bound_deployment}
    for argument in application._bound_deployment.init_args:
        if isinstance(argument, Application):
            found[argument._bound_deployment.name] = argument._bound_deployment
    return found


def bundles_of(deployment: Deployment) -> list[dict[str, float]] | None:
    return deployment._replica_config.placement_group_bundles


def test_a_pair_is_an_ingress_a_router_and_two_groups(model_dir: Path) -> None:
    deployments = build(model_dir, prefill={"replicas": 2}, decode={"replicas": 3}, serving={"ingress_replicas": 4})
    num_replicas = {name: deployment.num_replicas for name, deployment in deployments.items()}
    assert num_replicas == {"Ingress": 4, "Router": 1, "Prefill": 2, "Decode": 3}


def test_a_unified_cluster_has_one_group(model_dir: Path) -> None:
    assert set(build(model_dir, unified={})) == {"Ingress", "Router", "Unified"}


def test_processes_that_compute_nothing_take_next_to_no_cpu(model_dir: Path) -> None:
    for deployment in build(model_dir, unified={}).values():
        assert 0 < deployment.ray_actor_options["num_cpus"] <= 0.05
        assert not deployment.ray_actor_options.get("num_gpus")


def test_whom_an_ingress_refuses_serve_lets_through(model_dir: Path) -> None:
    """What Serve holds back would wait, and without a bound."""
    api = {"protection": {"max_open_requests": 10_000}}
    assert build(model_dir, unified={}, api=api)["Ingress"].max_ongoing_requests >= 11_000


def test_a_replica_has_a_bundle_for_its_head_and_one_per_rank(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "cluster_facts", lambda: GPUS)
    group = {"parallel": {"tensor": 4}, "resources_per_rank": {"mi300": 1}}
    head, *ranks = bundles_of(build(model_dir, unified=group)["Unified"]) or []
    assert set(head) == {"CPU"}
    assert [(rank["GPU"], rank["mi300"]) for rank in ranks] == [(1.0, 1)] * 4


def test_a_simulated_replica_has_one_rank_whatever_is_configured(model_dir: Path) -> None:
    group = {"parallel": {"tensor": 4}, "resources_per_rank": {"mi300": 1}}
    _, *ranks = bundles_of(build(model_dir, unified=group, simulation={})["Unified"]) or []
    assert [rank["mi300"] for rank in ranks] == [1]


def test_ranks_with_gpus_share_a_host_and_those_on_cpus_need_not(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpus = build(model_dir, unified={"parallel": {"tensor": 2}})["Unified"]
    assert on_cpus._replica_config.placement_group_strategy == "PACK"
    assert all("GPU" not in bundle for bundle in bundles_of(on_cpus) or [])
    monkeypatch.setattr(builders, "cluster_facts", lambda: GPUS)
    on_gpus = build(model_dir, unified={"parallel": {"tensor": 2}})["Unified"]
    assert on_gpus._replica_config.placement_group_strategy == "STRICT_PACK"


def test_autoscaling_replaces_the_number_of_replicas(model_dir: Path) -> None:
    group = {"autoscaling": {"min_replicas": 2, "max_replicas": 6, "target_requests": 5}}
    deployments = build(model_dir, prefill={}, decode=group)
    scaling = deployments["Decode"]._deployment_config.autoscaling_config
    assert scaling is not None and (scaling.min_replicas, scaling.max_replicas) == (2, 6)
    assert deployments["Prefill"]._deployment_config.autoscaling_config is None


def test_timeouts_and_logs_are_those_of_the_configuration(model_dir: Path) -> None:
    serving = {"health_check_period_s": 3.5, "drain_timeout_s": 20}
    deployments = build(
        model_dir, unified={}, serving=serving, observability={"log_level": "ERROR", "log_format": "json"}
    )
    engine, ingress = deployments["Unified"]._deployment_config, deployments["Ingress"]._deployment_config
    assert engine.health_check_period_s == 3.5
    # A replica that drains as long as it may has to stop its gang after that.
    assert engine.graceful_shutdown_timeout_s > 20
    assert (ingress.graceful_shutdown_timeout_s, ingress.max_surge_percent) == (60, 100)
    assert engine.max_surge_percent == 0
    for deployment in deployments.values():
        logging = deployment.logging_config
        assert (logging["log_level"], logging["encoding"], logging["enable_access_log"]) == ("ERROR", "JSON", False)


def test_serve_holds_no_request_back(model_dir: Path) -> None:
    assert build(model_dir, unified={})["Ingress"].max_ongoing_requests >= 1000


def test_every_process_gets_what_was_decided(model_dir: Path) -> None:
    deployments = build(model_dir, prefill={}, decode={})
    configs = [
        argument
        for deployment in deployments.values()
        for argument in deployment.init_args
        if isinstance(argument, ClusterConfig)
    ]
    assert len(configs) == 4 and all(config == configs[0] for config in configs)
    assert {group.device for group in configs[0].groups().values()} == {"cpu"}
    roles = {argument for deployment in deployments.values() for argument in deployment.init_args[2:3]}
    assert {"prefill", "decode"} <= {role for role in roles if isinstance(role, str)}


def test_what_cannot_work_is_refused_before_anything_starts(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cuda"):
        build(model_dir, unified={"device": "cuda"})
