"""A model split over two ranks computes what it computes on one."""

from pathlib import Path

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.models.registry import build_model, read_spec
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import Group, ProcessGroups
from tests.models.paged_driver import make_context
from tests.models.tensor_parallel_worker import run_model, run_rank
from tests.processes import run_ranks
from tests.tiny_models import TINY_MODELS, random_tokens, tiny_model_dir

_COUNTS = {"num_experts", "n_routed_experts", "num_local_experts"}
NAMES = [
    *TINY_MODELS,
    *(f"{name}/experts" for name, tiny in TINY_MODELS.items() if _COUNTS & tiny.values.keys()),
    "llama_one_kv_head/dummy",
    "qwen3_moe/experts/dummy",
    "glm4_moe/draft/dummy",
    "glm4_moe/experts/draft/dummy",
    "deepseek_v32/dummy",
    "deepseek_v4/dummy",
    "gpt_oss/dummy",
    "mimo_v2/dummy",
    "mimo_v2/draft/dummy",
    "qwen3_next/dummy",
    "qwen3_next/experts/draft/dummy",
]
"""Every tiny model split by tensors, those with experts also by experts; with drafting layers, and without a
checkpoint."""
TOKENS = random_tokens(30)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("gang")
    directories = {name: str(tiny_model_dir(name.split("/")[0])) for name in NAMES}
    meeting, out = f"file://{folder}/meeting", f"{folder}/logits.pt"
    run_ranks(run_rank, 2, meeting, directories, TOKENS, out, num_ranks=2)
    return torch.load(folder / "logits.pt")


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(name: str, two_ranks: dict[str, torch.Tensor]) -> None:
    directory = tiny_model_dir(name.split("/")[0])
    one_rank = run_model(name, directory, TOKENS, ProcessGroups.single())
    assert one_rank is not None and one_rank.std() > 0.1
    torch.testing.assert_close(two_ranks[name], one_rank, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_ranks", "reason"), [(3, "3 does not divide"), (8, "4 attention heads")])
def test_sizes_that_do_not_divide_are_refused(num_ranks: int, reason: str) -> None:
    groups = ProcessGroups(Group(rank=0, size=num_ranks, handle=None))
    spec = read_spec(Path(tiny_model_dir("llama")))
    with pytest.raises(ConfigError, match=reason):
        build_model(spec, make_context(torch_table("test"), groups=groups), max_model_len=16)
