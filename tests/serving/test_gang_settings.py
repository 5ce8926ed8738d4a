"""Every setting of an engine comes from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.load import load_args
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.errors import ConfigError
from atom_cluster.gang.engine_host import resolve
from atom_cluster.gang.spec import ModelRanks, SimulatedRank
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.serving import gang_settings
from atom_cluster.serving.gang_settings import device_of, gang_spec, make_host, make_simulated_runner

CPU_GROUP: dict[str, object] = {"device": "cpu", "threads_per_rank": 3}
GPU_GROUP: dict[str, object] = {
    "device": "cuda",
    "parallel": {"tensor": 4},
    "memory_fraction": 0.7,
    "resources_per_rank": {"mi300": 1},
}


def config_of(**args: object) -> ClusterConfig:
    return load_args({"model": "owner/model", **args})


def options_of(config: ClusterConfig, role: str = "unified") -> RunnerOptions:
    ranks = gang_spec(config, {}, role=role, peer_id="p").ranks  # type: ignore[arg-type]
    assert isinstance(ranks, ModelRanks)
    return ranks.options


def settings_of(config: ClusterConfig, **reasons: str) -> EngineHostSettings:
    settings = gang_spec(config, reasons, role="unified", peer_id="p").host_settings
    assert isinstance(settings, EngineHostSettings)
    return settings


def test_runner_options_come_from_the_configuration() -> None:
    config = config_of(
        model_options={
            "revision": "v2",
            "dtype": "bfloat16",
            "max_model_len": 777,
            "load_format": "dummy",
            "seed": 5,
        },
        unified=CPU_GROUP,
        cache={"block_size": 32, "num_blocks": 99, "cpu_cache_gib": 1.5},
        scheduler={"max_num_requests": 11, "max_num_batched_tokens": 123},
        ops={"backend": "torch", "overrides": {"norm": "triton"}},
        speculative={"num_tokens": 3},
    )
    assert options_of(config) == RunnerOptions(
        model_dir="owner/model",
        revision="v2",
        dtype="bfloat16",
        device="cpu",
        block_size=32,
        num_blocks=99,
        cpu_cache_gib=1.5,
        max_num_requests=11,
        max_model_len=777,
        max_num_batched_tokens=123,
        num_drafts=3,
        num_threads=3,
        ops_backend="torch",
        ops_overrides={"norm": "triton"},
        load_format="dummy",
        seed=5,
    )


def test_what_the_runner_decides_itself_stays_open() -> None:
    options = options_of(config_of(unified={"device": "cpu"}))
    assert (options.num_blocks, options.max_model_len, options.num_threads) == (None, None, None)


def test_a_gpu_group_has_a_rank_per_gpu() -> None:
    spec = gang_spec(config_of(unified=GPU_GROUP), {}, role="unified", peer_id="p")
    assert isinstance(spec.ranks, ModelRanks) and spec.ranks.num_ranks == 4
    assert (spec.device, spec.resources_per_rank) == ("cuda", {"mi300": 1})
    assert (spec.ranks.options.device, spec.ranks.options.memory_fraction) == ("cuda", 0.7)


def test_ranks_divide_experts_when_told() -> None:
    parallels = [{"tensor": 2}, {"tensor": 2, "expert": 2}]
    divides = [options_of(config_of(unified={"device": "cpu", "parallel": p})).divides_experts for p in parallels]
    assert divides == [False, True]


def test_only_engines_that_hand_over_have_a_transport() -> None:
    pair = config_of(prefill=CPU_GROUP, decode=CPU_GROUP, kv_transfer={"transport": "tcp"})
    assert [options_of(pair, role).kv_transport for role in ("prefill", "decode")] == ["tcp", "tcp"]
    assert options_of(config_of(unified=CPU_GROUP)).kv_transport is None


def test_host_settings_come_from_the_configuration() -> None:
    config = config_of(
        unified=CPU_GROUP,
        model_options={"served_name": "mine"},
        cache={"prefix_caching": False},
        router={"load_period_s": 0.3},
        serving={"ping_period_s": 0.4, "client_timeout_s": 9.0, "start_timeout_s": 33.0},
        observability={"metrics_period_s": 2.5},
        scheduler={"policy": "prefill_first"},
        kv_transfer={"lease_s": 4.0},
    )
    settings = settings_of(config, device="no GPU")
    assert (settings.peer_id, settings.role, settings.model) == ("p", "unified", "mine")
    assert (settings.scheduler, settings.transfer) == (config.scheduler, config.kv_transfer)
    assert (settings.prefix_caching, settings.load_period_s) == (False, 0.3)
    assert (settings.ping_period_s, settings.client_timeout_s, settings.metrics_period_s) == (0.4, 9.0, 2.5)
    assert settings.choices == {"device": "no GPU"}
    assert gang_spec(config, {}, role="unified", peer_id="p").start_timeout_s == 33.0


def test_secrets_are_not_part_of_what_a_deployment_carries() -> None:
    config = config_of(unified=CPU_GROUP)
    assert options_of(config).secret == settings_of(config).secret == b""


def test_a_group_whose_device_was_not_decided_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto"):
        device_of(config_of(unified={}).groups()["unified"])


def test_the_names_by_which_a_rank_finds_its_makers_are_right() -> None:
    spec = gang_spec(config_of(unified=CPU_GROUP), {}, role="unified", peer_id="p")
    assert resolve(spec.host_factory) is make_host
    assert resolve(spec.ranks.factory) is gang_settings.make_rank
    simulated = gang_spec(config_of(unified=CPU_GROUP, simulation={}), {}, role="unified", peer_id="p")
    assert resolve(simulated.ranks.factory) is make_simulated_runner


def test_a_simulation_needs_only_the_facts_about_the_model(model_dir: Path) -> None:
    config = load_args(
        {
            "model": str(model_dir),
            "prefill": CPU_GROUP,
            "decode": CPU_GROUP,
            "simulation": {"num_blocks": 50, "vocab_size": 77},
            "cache": {"block_size": 8},
            "scheduler": {"max_num_requests": 3},
        }
    )
    ranks = gang_spec(config, {}, role="decode", peer_id="p").ranks
    assert isinstance(ranks, SimulatedRank) and ranks.num_ranks == 1
    assert isinstance(ranks.argument, ClusterConfig)
    runner = make_simulated_runner(ranks.argument)
    info = runner.info
    assert isinstance(runner, SimulatedRunner)
    assert (info.num_blocks, info.vocab_size, info.block_size, info.max_num_requests) == (50, 77, 8, 3)
    assert info.max_model_len == 128  # of config.json
    runner.close()


def test_a_simulated_runner_without_a_simulation_is_refused() -> None:
    with pytest.raises(ConfigError, match="simulation"):
        make_simulated_runner(config_of(unified=CPU_GROUP))


def test_a_host_learns_address_and_secret_where_it_runs(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_settings, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(gang_settings, "cluster_secret", lambda: b"a secret of the cluster")
    monkeypatch.setattr(gang_settings, "RayMetrics", lambda labels, period_s: NullMetrics())
    config = load_args({"model": str(model_dir), "unified": CPU_GROUP, "simulation": {}})
    host = make_host(runner=make_simulated_runner(config), settings=settings_of(config))
    card = host.start()
    assert card.address.endpoint.startswith("tcp://127.0.0.1:") and card.address.peer_id == "p"
    host.close()
