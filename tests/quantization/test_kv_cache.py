"""Keys and values cached in float8, with the scales of a checkpoint if it has any."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atom_cluster.config.ops import OpsConfig
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write
from tests.tiny_models import random_tokens, reference_logits, tiny_model_dir

TOKENS = random_tokens(40)
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["model"]}


def logits(directory: Path, *, backend: str = "torch", kv_dtype: str | None = "float8_e4m3fn") -> torch.Tensor:
    ops = select_ops(OpsConfig.model_validate({"backend": backend}), detect_platform("cpu"), torch.float32)
    context = replace(make_context(ops), kv_dtype=kv_dtype)
    driver = PagedDriver(load_model(directory, context=context, max_model_len=64))
    return torch.cat([driver.step([(0, TOKENS[:35])])[0], *[driver.step([(0, [token])])[0] for token in TOKENS[35:]]])


def with_scales(folder: Path, key: float, value: float, names: tuple[str, str]) -> Path:
    source = tiny_model_dir("llama")
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for name, scale in zip(names, (key, value)):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    config = json.loads((source / "config.json").read_text())
    return write(folder / "scaled", {**config, "quantization_config": CONFIG}, tensors)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("name", "most"), [("llama", 0.05), ("gpt_oss", 0.1), ("deepseek_v3", 0.2)])
def test_logits_stay_close_to_exact_ones(name: str, most: float, backend: str) -> None:
    exact = reference_logits(name, TOKENS)
    error = (logits(tiny_model_dir(name), backend=backend) - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < most


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")])
def test_scales_of_a_checkpoint_are_used_and_undone(names: tuple[str, str], tmp_path: Path) -> None:
    plain = logits(tiny_model_dir("llama"))
    (tmp_path / "a").mkdir()
    # A power of two rounds alike as long as nothing is too small or too large.
    torch.testing.assert_close(logits(with_scales(tmp_path / "a", 0.25, 0.125, names)), plain, atol=0.02, rtol=0)
    # Divided by that much, only the largest values are still above zero.
    assert (logits(with_scales(tmp_path, 300.0, 300.0, names)) - plain).abs().max() > 0.1


def test_scales_are_not_needed_for_an_exact_cache(tmp_path: Path) -> None:
    scaled = with_scales(tmp_path, 300.0, 300.0, ("k_scale", "v_scale"))
    torch.testing.assert_close(
        logits(scaled, kv_dtype=None), logits(tiny_model_dir("llama"), kv_dtype=None), atol=1e-6, rtol=0
    )


def test_the_runner_caches_what_the_options_say() -> None:
    options = RunnerOptions(
        model_dir=str(tiny_model_dir("llama")), device="cpu", num_blocks=8, max_model_len=32, kv_dtype="fp8"
    )
    runner = build_model_runner(options)
    assert runner.info.fingerprint_fields["kv_layout"].startswith("float8_e4m3fn:2x16+16")
    runner.close()
