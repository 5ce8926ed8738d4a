"""Quantized models, and caches of eight bits, compute on a CUDA or ROCm device what they compute on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from atom_cluster.quantization.quantize import QUANTIZERS
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write_gpt_oss_pair, write_pair
from tests.quantization.formats import FORMATS
from tests.quantization.test_checkpoints import CASES
from tests.tiny_models import random_tokens, tiny_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

TOKENS = random_tokens(24)


def logits(directory: Path, device: str, *, online: str | None = None, kv_dtype: str | None = None) -> torch.Tensor:
    context = replace(make_context(torch_table("test"), dtype=torch.float64, device=device), kv_dtype=kv_dtype)
    quantization = QuantizationConfig.model_validate({"online": online})
    model = load_model(directory, context=context, max_model_len=64, quantization=quantization)
    driver = PagedDriver(model, device=device)
    return torch.cat([driver.step([(0, TOKENS[:20])])[0], driver.step([(0, TOKENS[20:])])[0]]).cpu()


def assert_a_device_computes_what_a_cpu_does(directory: Path, **options: str) -> None:
    expected = logits(directory, "cpu", **options)
    assert expected.isfinite().all() and expected.std() > 0.1
    torch.testing.assert_close(logits(directory, "cuda", **options), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_checkpoints_of_every_format(name: str, form: str, tmp_path: Path) -> None:
    assert_a_device_computes_what_a_cpu_does(write_pair(name, FORMATS[form], tmp_path)[0])


def test_stacked_experts_of_four_bits(tmp_path: Path) -> None:
    assert_a_device_computes_what_a_cpu_does(write_gpt_oss_pair(tmp_path)[0])


@pytest.mark.parametrize("online", QUANTIZERS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_weights_quantized_while_they_are_loaded(name: str, online: str) -> None:
    assert_a_device_computes_what_a_cpu_does(tiny_model_dir(name), online=online)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v32"])
def test_caches_of_eight_bits(name: str) -> None:
    assert_a_device_computes_what_a_cpu_does(tiny_model_dir(name), kv_dtype="float8_e4m3fn")
