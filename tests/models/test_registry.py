"""From a directory to a loaded model."""

import json
from pathlib import Path

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import ConfigError, WeightsError
from atom_cluster.models.registry import describe_weights, load_model, read_spec
from atom_cluster.ops.cpu import can_pack
from atom_cluster.ops.select import select_ops, torch_table
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import random_tokens, tiny_model_dir


def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_spec(tmp_path)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    config = json.loads((tiny_model_dir("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        load_model(tmp_path, context=make_context(torch_table("test")), max_model_len=16)


def test_a_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir("llama") / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_model(tmp_path, context=make_context(torch_table("test")), max_model_len=16)


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    context = make_context(torch_table("test"))
    logits = []
    for seed in (1, 1, 2):
        model = load_model(tiny_model_dir("qwen3"), context=context, max_model_len=64, load_format="dummy", seed=seed)
        logits.append(PagedDriver(model).step([(0, random_tokens(8))])[0])
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


@pytest.mark.skipif(not can_pack(), reason="this build of torch has no FBGEMM")
def test_what_became_of_the_weights_is_said() -> None:
    ops = select_ops(OpsConfig(), detect_platform("cpu"), torch.float32)
    described = [
        describe_weights(load_model(tiny_model_dir("llama", dtype), context=make_context(ops), max_model_len=64))
        for dtype in ("float32", "bfloat16")
    ]
    assert described == ["9 float32", "9 packed float16"]


def test_kv_sizes_are_those_of_the_ranks_heads() -> None:
    layout = load_model(
        tiny_model_dir("qwen3"), context=make_context(torch_table("test")), max_model_len=64, load_format="dummy"
    ).kv_layout
    assert layout.page_bytes(layout.groups[0], 3) == 3 * 2 * 2 * (32 + 32) * 4
