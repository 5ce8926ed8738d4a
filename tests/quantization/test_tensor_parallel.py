"""Quantized models split over two ranks compute what they compute on one, in formats whose inputs round alike there."""

from pathlib import Path

import pytest
import torch

from atom_cluster.parallel.groups import ProcessGroups
from tests.models.tensor_parallel_worker import run_model, run_rank
from tests.processes import run_ranks
from tests.quantization.checkpoints import write_gpt_oss_pair, write_pair
from tests.quantization.formats import FORMATS
from tests.tiny_models import random_tokens

LLAMA_FORMATS = [
    "fp8_block_ue8m0",
    "ct_fp8_block",
    "ct_fp8_static",
    "ct_mxfp8",
    "ct_int4_reordered",
    "ct_int8_packed",
    "ct_mxfp4",
    "quark_mxfp4",
    "awq",
    "gptq",
    "gptq_reordered",
    "gptq_channel",
]
MOE_FORMATS = ["ct_fp8_static", "gptq_reordered", "awq"]
"""Also with experts that are split within their groups of 32."""
TOKENS = random_tokens(30)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"gpt_oss": write_gpt_oss_pair(tmp_path_factory.mktemp("gpt_oss"))[0]}
    found["gpt_oss/experts"] = found["gpt_oss/experts/dummy"] = found["gpt_oss/dummy"] = found["gpt_oss"]
    for name, forms in (("llama", LLAMA_FORMATS), ("qwen3_moe", MOE_FORMATS)):
        for form in forms:
            directory = write_pair(name, FORMATS[form], tmp_path_factory.mktemp(form))[0]
            found[f"{name}/{form}"] = directory
            if name != "llama":
                found[f"{name}/experts/{form}"] = directory
    found["llama/awq/dummy"] = found["llama/awq"]
    found["llama/ct_fp8_block/dummy"] = found["llama/ct_fp8_block"]
    return found


def test_two_ranks_equal_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directories = {name: str(directory) for name, directory in checkpoints.items()}
    meeting, out = f"file://{tmp_path}/meeting", f"{tmp_path}/logits.pt"
    run_ranks(run_rank, 2, meeting, directories, TOKENS, out, num_ranks=2)
    two_ranks = torch.load(tmp_path / "logits.pt")
    for name, directory in checkpoints.items():
        one_rank = run_model(name, directory, TOKENS, ProcessGroups.single())
        assert one_rank is not None and one_rank.isfinite().all() and one_rank.std() > 0.1, name
        assert (two_ranks[name] - one_rank).abs().max() < 1e-6, name
