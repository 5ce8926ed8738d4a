"""Shipped configurations on known accelerators, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.config.accelerators import ACCELERATORS, Accelerator
from atom_cluster.config.load import load_args, load_file
from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.published import published_model
from atom_cluster.tools.check_config import resolve_for
from atom_cluster.tools.memory_docs import main, render
from atom_cluster.tools.memory_table import GroupMemory, describe_groups, plan_groups
from atom_cluster.tools.model_source import ModelSource
from atom_cluster.units import GiB

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 20,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
"""A quarter of the layers of Llama-70B: 36.4 GiB in bfloat16."""
CARD = Accelerator(name="card", vendor="cuda", memory_bytes=22 * GiB, gpus_per_node=4)


def plan(args: dict[str, object], accelerator: Accelerator | None = CARD) -> list[GroupMemory]:
    config = load_args({"model": "m", **args})
    resolved, planned = resolve_for(config, ModelSource(LLAMA, "here"), accelerator)
    return plan_groups(resolved.config, HfConfig(LLAMA), planned)


def test_the_page_in_the_repository_is_current(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which shows that every configuration for GPUs resolves and fits on each known accelerator."""
    arguments = [str(repo_root / "docs" / "model_memory.md"), str(repo_root / "configs"), "--check"]
    assert main(arguments) == 0, capsys.readouterr().err


def test_the_page_has_a_row_for_every_configuration_for_gpus(repo_root: Path) -> None:
    page = (repo_root / "docs" / "model_memory.md").read_text()
    for path in (repo_root / "configs").glob("*.yaml"):
        (application,) = load_file(path).applications
        is_for_gpus = any(group.device == "cuda" for group in application.args.groups().values())
        assert (f"| `configs/{path.name}` |" in page) == is_for_gpus


def test_every_model_of_a_configuration_is_known_without_its_checkpoint(repo_root: Path) -> None:
    for path in (repo_root / "configs").glob("*.yaml"):
        (application,) = load_file(path).applications
        assert published_model(application.args.model) is not None, path


def test_a_page_that_is_not_current_is_reported(tmp_path: Path, repo_root: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    source = repo_root / "configs" / "llama_8b_unified.yaml"
    (configs / source.name).write_text(source.read_text())
    page = tmp_path / "page.md"
    assert main([str(page), str(configs), "--check"]) == 1
    assert main([str(page), str(configs)]) == 0
    assert main([str(page), str(configs), "--check"]) == 0
    assert render(configs).count("| `configs/") == 1


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_what_would_do() -> None:
    with pytest.raises(ConfigError) as error:
        plan({"unified": {"device": "cuda"}})
    text = str(error.value)
    assert "`unified` does not fit card" in text
    assert "0.88 of 22.00 GiB, less 36.4" in text
    # 18.2 GiB of weights on each of two ranks, 1.5 for the runtime, and 1.3 for a step, of 19.4 GiB; four have room.
    assert "parallel.tensor: 4 would do, on one node of 4" in text


def test_the_least_degree_may_take_several_nodes() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor: 8 would do, on 2 nodes of 4"):
        plan(
            {"unified": {"device": "cuda"}},
            Accelerator(name="small", vendor="cuda", memory_bytes=8 * GiB, gpus_per_node=4),
        )


def test_a_model_that_never_fits_is_said_to() -> None:
    with pytest.raises(ConfigError, match=r"no parallel\.tensor up to 64 would do"):
        plan({"unified": {"device": "cuda"}}, Accelerator(name="tiny", vendor="cuda", memory_bytes=GiB))


def test_more_blocks_than_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`cache\.num_blocks` is 100000"):
        plan({"unified": {"device": "cuda", "parallel": {"tensor": 4}}, "cache": {"num_blocks": 100_000}})


def test_groups_are_planned_each_by_its_own_ranks() -> None:
    four, eight = (
        {"device": "cuda", "parallel": {"tensor": 4}},
        {"device": "cuda", "parallel": {"tensor": 8}, "replicas": 2},
    )
    prefill, decode = plan({"prefill": four, "decode": eight})
    assert prefill.memory.weight_bytes > 1.9 * decode.memory.weight_bytes
    assert decode.num_tokens > 2 * prefill.num_tokens  # twice the ranks for its heads, and more room on each
    assert describe_groups([prefill, decode]).splitlines()[-1] == "in all: 20 card, at least 5 nodes of 4"


def test_cpus_have_what_is_configured() -> None:
    (group,) = plan({"unified": {"device": "cpu"}, "cache": {"cpu_cache_gib": 2}}, None)
    assert group.accelerator is None and group.kv_bytes == 2 * GiB


def test_hardware_that_is_known() -> None:
    assert set(ACCELERATORS) == {"MI300X", "MI355X", "H200"}
