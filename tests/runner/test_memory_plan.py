"""The plan of a rank's memory against arithmetic by hand, against loaded tiny models, and against measured H200s."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.published import PublishedModel, published_models
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.memory_plan import RankMemory, RankShape, measure
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.units import GiB
from benchmarks.shapes import SHAPES
from tests.draft_models import draft_model_dir
from tests.tiny_models import tiny_model_dir

PUBLISHED = {model.key: model for model in published_models()}
LARGE = sorted(key for key in PUBLISHED if key != "smollm2_135m")
SHORT = RankShape(max_model_len=64, max_num_batched_tokens=128)


def plan(model: PublishedModel, *, num_layers: int | None = None, **changes: Any) -> RankMemory:
    """num_layers: the first so many of its layers, which is quicker."""
    config = model.config if num_layers is None else shortened(model, num_layers)
    return measure(HfConfig(config), replace(SHORT, **changes))


def shortened(model: PublishedModel, num_layers: int) -> dict[str, Any]:
    cut = {"layer_types": model.config["layer_types"][:num_layers]} if "layer_types" in model.config else {}  # type: ignore[index]
    return {**model.config, **cut, "num_hidden_layers": num_layers}


# --- by hand, from the shapes that publishers give ------------------------------------------------------------------


def by_hand(config: dict[str, Any]) -> dict[str, float]:
    """Parameters of a whole model, by kind; norms, biases and routers left out, which are below 0.5 %."""
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads = config["num_attention_heads"]
    if "kv_lora_rank" in config:
        q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        attention = hidden * q_rank + q_rank * heads * (nope + rope) + hidden * (kv_rank + rope)
        attention += kv_rank * heads * (nope + value) + heads * value * hidden
        if "index_n_heads" in config:
            index_dim = config["index_n_heads"] * config["index_head_dim"]
            attention += q_rank * index_dim + hidden * (config["index_head_dim"] + config["index_n_heads"])
    else:
        dim = config["head_dim"]
        attention = 2 * hidden * heads * dim + 2 * hidden * config["num_key_value_heads"] * dim
    num_experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts") or 0
    expert_size = config.get("moe_intermediate_size", config["intermediate_size"])
    first_dense = config.get("first_k_dense_replace", 0) if num_experts else layers
    sparse = layers - first_dense
    dense = first_dense * 3 * hidden * config["intermediate_size"]
    dense += sparse * config.get("n_shared_experts", 0) * 3 * hidden * expert_size
    return {
        "attention": layers * attention,
        "experts": sparse * num_experts * 3 * hidden * expert_size,
        "other MLPs": dense,
        "embeddings": vocab * hidden * (1 if config["tie_word_embeddings"] else 2),
    }


def bytes_by_hand(config: dict[str, Any]) -> dict[str, float]:
    """The same in bytes, as the formats store them: FP8 with a float32 scale for 128x128, MXFP4 with a byte for 32."""
    sizes = by_hand(config)
    method = config.get("quantization_config", {}).get("quant_method")
    of_experts = {"fp8": 1 + 4 / 128**2, "mxfp4": 0.5 + 1 / 32}.get(method, 2.0)
    of_linear = 1 + 4 / 128**2 if method == "fp8" else 2.0
    sizes["experts"] *= of_experts
    sizes["other MLPs"] *= of_linear
    sizes["embeddings"] *= 2
    sizes["attention"] *= of_linear
    if method == "fp8" and "kv_lora_rank" in config:
        # What latents are expanded by is kept in bfloat16.
        per_head = config["qk_nope_head_dim"] + config["v_head_dim"]
        up = config["kv_lora_rank"] * config["num_attention_heads"] * per_head
        sizes["attention"] += config["num_hidden_layers"] * up * (2 - of_linear)
    return sizes


@pytest.mark.parametrize("key", LARGE)
def test_shapes_come_to_the_parameters_that_publishers_name(key: str) -> None:
    assert sum(by_hand(PUBLISHED[key].config).values()) == pytest.approx(PUBLISHED[key].num_parameters, rel=0.01)


@pytest.mark.parametrize("key", LARGE)
def test_weights_of_one_rank_are_what_the_shapes_come_to(key: str) -> None:
    num_layers = None if key in ("deepseek_r1", "gpt_oss_120b", "llama_8b") else 6
    planned = plan(PUBLISHED[key], num_layers=num_layers).weights
    config = PUBLISHED[key].config if num_layers is None else shortened(PUBLISHED[key], num_layers)
    for kind, size in bytes_by_hand(config).items():
        assert planned.get(kind, 0) == pytest.approx(size, rel=0.005), kind  # type: ignore[call-overload]
    assert planned["others"] < 0.005 * sum(planned.values())


@pytest.mark.parametrize("key", ["deepseek_r1", "glm_5", "qwen3_235b"])
def test_ranks_divide_experts_heads_and_vocabulary(key: str) -> None:
    num_ranks, num_layers = 4 if key == "qwen3_235b" else 8, 5
    alone = plan(PUBLISHED[key], num_layers=num_layers).weights
    divided = plan(PUBLISHED[key], num_layers=num_layers, num_ranks=num_ranks, divides_experts=True).weights
    assert divided["experts"] == alone["experts"] / num_ranks
    assert divided["embeddings"] == pytest.approx(alone["embeddings"] / num_ranks, rel=1e-4)
    config: dict[str, Any] = PUBLISHED[key].config
    hidden, whole = config["hidden_size"], 0
    if key != "qwen3_235b":  # projections to latents are on every rank
        whole = hidden * (config["q_lora_rank"] + config["kv_lora_rank"] + config["qk_rope_head_dim"])
    if key == "glm_5":  # and so is the index, whose weights of heads are float32
        heads, dim = config["index_n_heads"], config["index_head_dim"]
        whole += config["q_lora_rank"] * heads * dim + hidden * (dim + 4 * heads)
    expected = (alone["attention"] - num_layers * whole) / num_ranks + num_layers * whole
    assert divided["attention"] == pytest.approx(expected, rel=0.005)


def test_a_layer_for_drafting_is_one_more_layer_and_a_projection() -> None:
    config: dict[str, Any] = PUBLISHED["deepseek_r1"].config
    hidden, one = config["hidden_size"], by_hand({**config, "num_hidden_layers": 1, "first_k_dense_replace": 0})
    expected = one["attention"] + one["experts"] + one["other MLPs"] + 2 * hidden * hidden
    drafting = plan(PUBLISHED["deepseek_r1"], num_layers=3, num_drafts=2).weights["drafting"]
    assert drafting == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("key", "num_ranks", "kv_dtype", "of_two_layers"),
    [
        ("llama_8b", 1, "auto", 2 * 2 * 8 * 128 * 2),
        ("llama_8b", 4, "fp8", 2 * 2 * 2 * 128),
        ("qwen3_235b", 4, "auto", 2 * 2 * 1 * 128 * 2),
        ("qwen3_235b", 8, "auto", 2 * 2 * 1 * 128 * 2),  # two ranks share a head
        ("deepseek_r1", 8, "fp8", 2 * (512 + 64)),
        ("kimi_k2", 8, "auto", 2 * (512 + 64) * 2),
        ("glm_5", 8, "auto", 2 * (512 + 64 + 128) * 2),
        ("gpt_oss_120b", 1, "auto", 2 * 1 * 8 * 64 * 2),  # the other half of the layers keeps windows
    ],
)
def test_kv_of_a_token(key: str, num_ranks: int, kv_dtype: Any, of_two_layers: int) -> None:
    planned = plan(PUBLISHED[key], num_layers=2, num_ranks=num_ranks, kv_dtype=kv_dtype)
    assert planned.kv_bytes_per_token == of_two_layers


# --- tiny models that can be loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prepared_bytes"),
    [
        ("llama", 0),
        ("qwen3_moe", 0),
        ("gpt_oss", 0),
        ("deepseek_v32", 0),
        ("deepseek_v4", 4608),  # small vectors that are kept in two forms
        ("qwen3_next", 7488),
    ],
)
def test_weights_are_the_tensors_of_a_checkpoint_and_the_tables_of_positions(name: str, prepared_bytes: int) -> None:
    directory = tiny_model_dir(name)
    config = HfConfig.read(directory)
    planned = measure(config, replace(SHORT, dtype="float32"))
    file = (directory / "model.safetensors").read_bytes()
    stored = len(file) - 8 - int.from_bytes(file[:8], "little")  # behind the header and its length
    longer = measure(config, replace(SHORT, dtype="float32", max_model_len=128))
    tables = (longer.weight_bytes - planned.weight_bytes) // 64 * (64 + 2)
    assert planned.weight_bytes == stored + tables + prepared_bytes


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "qwen3_next", "draft"])
def test_kv_blocks_are_those_of_a_rank_that_is_built(name: str) -> None:
    directory = draft_model_dir("deepseek_v3") if name == "draft" else tiny_model_dir(name)
    num_drafts = 2 if name == "draft" else 0
    shape = replace(SHORT, dtype="float32", block_size=8, max_num_requests=4, num_drafts=num_drafts)
    options = RunnerOptions(
        model_dir=str(directory),
        dtype="float32",
        device="cpu",
        ops_backend="torch",
        block_size=8,
        cpu_cache_gib=0.002,
        max_num_requests=4,
        max_model_len=64,
        max_num_batched_tokens=128,
        num_drafts=num_drafts,
        num_threads=1,
    )
    runner = build_model_runner(options)
    try:
        assert measure(HfConfig.read(directory), shape).num_blocks(int(0.002 * GiB)) == runner.info.num_blocks
    finally:
        runner.close()


def test_a_model_without_layers_for_it_cannot_draft() -> None:
    with pytest.raises(ConfigError, match="no layers for it"):
        plan(PUBLISHED["kimi_k2"], num_drafts=1)


def test_heads_that_cannot_be_divided_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 3 does not divide"):
        plan(PUBLISHED["llama_8b"], num_ranks=3)


def test_online_quantization_counts_what_it_leaves() -> None:
    model = PUBLISHED["smollm2_135m"]
    plain = plan(model, num_layers=2)
    quantized = plan(model, num_layers=2, quantization=QuantizationConfig(online="fp8"))
    assert quantized.weights["other MLPs"] == pytest.approx(plain.weights["other MLPs"] / 2, rel=0.01)
    assert quantized.weights["embeddings"] == plain.weights["embeddings"]


# --- what engines measured on H200s ---------------------------------------------------------------------------------

MEASURED = re.compile(r"less ([\d.]+) GiB in use by weights and others, less ([\d.]+) GiB for a step of (\d+) tokens")


def records(results: Path) -> list[tuple[str, RankShape, float, float]]:
    """(shape's name, what its rank was, GiB in use, GiB of a step) of every record of one of our shapes on a GPU."""
    found = []
    for path in sorted(results.glob("offline_throughput_*.json")):
        record = json.loads(path.read_text())
        measured = MEASURED.search(record.get("choices", {}).get("kv_blocks", ""))
        model = re.search(r"--model shape:(\w+)(?= |$)", record["command"])
        if measured is None or model is None or "_fp8" in path.name:
            continue  # quantized while loading leaves gaps between tensors
        tensor = re.search(r"--tensor-parallel-size (\d+)", record["command"])
        drafts = re.search(r"(\d+) drafts", record["choices"]["speculative"])
        shape = RankShape(
            num_ranks=int(tensor[1]) if tensor else 1,
            max_model_len=SHAPES[model[1]]["max_position_embeddings"],
            max_num_batched_tokens=int(measured[3]),
            num_drafts=int(drafts[1]) if drafts else 0,
        )
        found.append((model[1], shape, float(measured[1]), float(measured[2])))
    return found


def test_estimates_are_near_what_was_measured(repo_root: Path) -> None:
    latest = {}
    for record in records(repo_root / "benchmarks" / "results"):
        name, shape, _, _ = record
        latest[name, shape.num_ranks, shape.num_drafts > 0] = record
    assert len(latest) >= 7
    for name, shape, in_use_gib, step_gib in latest.values():
        memory = measure(HfConfig(SHAPES[name]), shape)
        planned = (memory.weight_bytes + memory.runtime_bytes) / GiB
        assert planned == pytest.approx(in_use_gib, abs=0.25), (name, shape)
        assert memory.step_bytes / GiB == pytest.approx(step_gib, rel=0.125), (name, shape)
