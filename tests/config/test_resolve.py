from __future__ import annotations

from dataclasses import replace

import pytest

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.facts import EvenKv, ModelFacts, PlatformFacts
from atom_cluster.config.load import load_args
from atom_cluster.config.resolve import resolve
from atom_cluster.errors import ConfigError

CPU = PlatformFacts(vendor="cpu", num_gpus=0, num_cores=9, is_single_host=False)
GPU = PlatformFacts(vendor="rocm", num_gpus=8, num_cores=64, is_single_host=True)
MODEL = ModelFacts(dtype="bfloat16", max_positions=8192, kv=EvenKv(num_layers=30, num_kv_heads=3, head_dim=64))

PAIR: dict[str, object] = {"model": "demo:tiny", "prefill": {}, "decode": {"replicas": 3}}
UNIFIED: dict[str, object] = {"model": "owner/Tiny-1B/", "unified": {}}


def args(base: dict[str, object], **changes: object) -> ClusterConfig:
    return load_args({**base, **changes})


def value(config: ClusterConfig, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("config", "platform", "model", "key", "expected", "reason"),
    [
        (args(PAIR), CPU, MODEL, "prefill.device", "cpu", "no GPU"),
        (args(PAIR), GPU, MODEL, "decode.device", "cuda", "8 rocm GPUs"),
        (args(PAIR), CPU, MODEL, "decode.threads_per_rank", 2, "all but one of 9 cores, divided by 4 ranks"),
        (args(UNIFIED), CPU, MODEL, "unified.threads_per_rank", 8, "by 1 ranks"),
        (args(UNIFIED), replace(CPU, num_cores=1), MODEL, "unified.threads_per_rank", 1, "at least one"),
        (args(PAIR), GPU, MODEL, "prefill.threads_per_rank", 1, "compute nothing"),
        (args(PAIR), CPU, MODEL, "model_options.dtype", "float32", "CPUs"),
        (args(PAIR), GPU, MODEL, "model_options.dtype", "bfloat16", "of the checkpoint"),
        (args(PAIR), GPU, replace(MODEL, dtype="float32"), "model_options.dtype", "float32", "of the checkpoint"),
        (args(PAIR), GPU, replace(MODEL, dtype="float16"), "model_options.dtype", "bfloat16", "has float16"),
        (args(PAIR, prefill={"device": "cpu"}), GPU, MODEL, "model_options.dtype", "float32", "CPUs"),
        (args(PAIR), CPU, MODEL, "cache.num_blocks", 728, "0.5 GiB of `cpu_cache_gib` at 46080 bytes"),
        (
            args(PAIR, cache={"kv_dtype": "fp8"}),
            CPU,
            MODEL,
            "cache.num_blocks",
            2912,
            "11520 bytes per token of fp8 KV",
        ),
        (args(PAIR), GPU, MODEL, "cache.num_blocks", "auto", "each engine measures"),
        (args(PAIR), CPU, MODEL, "model_options.max_model_len", 8192, "limit of the checkpoint"),
        (args(PAIR, cache={"num_blocks": 100}), CPU, MODEL, "model_options.max_model_len", 1600, "holds 1600 tokens"),
        (args(PAIR), CPU, MODEL, "kv_transfer.transport", "auto", "each pair of engines"),
        (args(PAIR), replace(CPU, is_single_host=True), MODEL, "kv_transfer.transport", "shm", "on one host"),
        (args(PAIR), GPU, MODEL, "kv_transfer.transport", "auto", "each pair of engines"),
        (args(UNIFIED), GPU, MODEL, "kv_transfer.transport", "auto", "unused"),
        (args(PAIR), CPU, MODEL, "ops.backend", "cpu", "fastest on CPUs"),
        (args(PAIR), GPU, MODEL, "ops.backend", "auto", "GPU"),
        (args(PAIR), CPU, MODEL, "model_options.served_name", "tiny", "last part"),
        (args(UNIFIED), CPU, MODEL, "model_options.served_name", "Tiny-1B", "last part"),
        (args(PAIR, simulation={"num_blocks": 9}), GPU, MODEL, "cache.num_blocks", 9, "simulated"),
        (args(PAIR, simulation={}), GPU, MODEL, "prefill.device", "cpu", "simulated"),
    ],
)
def test_automatic_values_are_chosen_with_a_reason(
    config: ClusterConfig, platform: PlatformFacts, model: ModelFacts, key: str, expected: object, reason: str
) -> None:
    resolved = resolve(config, platform, model)
    assert value(resolved.config, key) == expected
    assert reason in resolved.reasons[key]


def test_tensor_parallel_ranks_share_the_kv_heads() -> None:
    config = args(UNIFIED, unified={"parallel": {"tensor": 3}})
    assert resolve(config, CPU, MODEL).config.cache.num_blocks == (1 << 29) // (46080 // 3 * 16)


def test_the_context_leaves_room_for_what_drafting_writes_behind_the_last_token() -> None:
    config = args(PAIR, cache={"num_blocks": 100}, speculative={"num_tokens": 3})
    assert resolve(config, CPU, MODEL).config.model_options.max_model_len == 1598


def test_given_values_are_kept_and_need_no_reason() -> None:
    config = args(
        UNIFIED,
        unified={"device": "cpu", "threads_per_rank": 3},
        model_options={"dtype": "bfloat16", "max_model_len": 100, "served_name": "name"},
        cache={"num_blocks": 10},
        kv_transfer={"transport": "tcp"},
        ops={"backend": "torch"},
    )
    resolved = resolve(config, GPU, MODEL)
    assert resolved.config == config
    assert resolved.reasons == {}


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(args(PAIR), CPU, MODEL)
    assert resolve(once.config, CPU, MODEL).config == once.config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (args(UNIFIED, unified={"device": "cuda"}), "`unified.device` is cuda, and the cluster has no GPU"),
        (args(UNIFIED, cache={"cpu_cache_gib": 1e-6}), "`cache.cpu_cache_gib`"),
        (args(UNIFIED, model_options={"max_model_len": 9000}), "made for 8192 tokens"),
        (args(UNIFIED, model_options={"max_model_len": 64}, cache={"num_blocks": 2}), "KV cache holds 32 tokens"),
        (args(UNIFIED, scheduler={"chunked_prefill": False, "max_num_batched_tokens": 64}), "never fit a step"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_the_key(config: ClusterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config, CPU, MODEL)


def test_the_cpu_backend_is_refused_on_gpus() -> None:
    with pytest.raises(ConfigError, match=r"`ops\.backend` is cpu"):
        resolve(args(PAIR, ops={"backend": "cpu"}), GPU, MODEL)
