"""gpt-oss as it is on the hub: experts in MXFP4, gate and up rows in turn, blocks of 32 inputs as 16 bytes."""

from pathlib import Path

import pytest
import torch

from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from tests.models.paged_driver import PagedDriver, make_context
from tests.quantization.checkpoints import write_gpt_oss_pair
from tests.tiny_models import random_tokens, tiny_model_dir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_gpt_oss_pair(tmp_path_factory.mktemp("gpt_oss"))


def logits(directory: Path) -> torch.Tensor:
    context = make_context(torch_table("test"), dtype=torch.float64)
    return PagedDriver(load_model(directory, context=context, max_model_len=64)).step([(0, random_tokens(30))])[0]


def test_experts_stand_for_what_transformers_says(pair: tuple[Path, Path]) -> None:
    found, expected = logits(pair[0]), logits(pair[1])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (expected - logits(tiny_model_dir("gpt_oss"))).abs().max() > 1e-3
