"""Checkpoints in every format load as they are on the hub and compute what their numbers stand for, to rounding."""

from pathlib import Path

import pytest
import torch

from atom_cluster.models import registry
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write_pair
from tests.quantization.formats import FORMATS
from tests.quantization.rounding import RoundingPlan
from tests.tiny_models import random_tokens

TOKENS = random_tokens(24)
MOE_FORMATS = ["fp8_block", "ct_fp8_channel", "ct_fp8_static", "ct_int4_reordered", "quark_mxfp4", "awq", "gptq"]
CASES = [("llama", form) for form in FORMATS] + [("qwen3_moe", form) for form in MOE_FORMATS]
CASES += [("deepseek_v3", form) for form in ("ct_fp8_channel", "ct_int4")]


def logits(directory: Path) -> torch.Tensor:
    context = make_context(torch_table("test"), dtype=torch.float64)
    model = load_model(directory, context=context, max_model_len=64)
    driver = PagedDriver(model)
    return torch.cat([driver.step([(0, TOKENS[:20])])[0], driver.step([(0, TOKENS[20:])])[0]])


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_quantized_checkpoint_computes_what_it_stands_for(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, meant = write_pair(name, FORMATS[form], tmp_path)
    found = logits(quantized)
    monkeypatch.setattr(registry, "read_plan", lambda *_: RoundingPlan(FORMATS[form].round_inputs))
    expected = logits(meant)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert expected.std() > 0.1
