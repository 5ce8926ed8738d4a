"""Every model computes on a CUDA or ROCm device what it computes on a CPU, also split over two devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups
from tests.models.paged_driver import PagedDriver, make_context
from tests.models.tensor_parallel_worker import run_model, run_rank
from tests.tiny_models import TINY_MODELS, random_tokens, tiny_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
SPLIT = [
    "llama",
    "gpt_oss",
    "qwen3_moe",
    "qwen3_moe/experts",
    "deepseek_v3",
    "deepseek_v3/experts",
    "deepseek_v32",
    "qwen3_next",
    "qwen3_next/experts",
    "mimo_v2",
    "glm4_moe/draft/dummy",
]


def logits(name: str, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of two prompts, in steps that mix chunks and decodes."""
    context = make_context(torch_table("test"), dtype=dtype, device=device)
    driver = PagedDriver(load_model(tiny_model_dir(name), context=context, max_model_len=64), device=device)
    long, short = random_tokens(45, seed=1), random_tokens(11, seed=2)
    plan = [
        [(0, long[:13]), (1, short[:5])],
        [(1, short[5:6]), (0, long[13:40])],
        [(0, long[40:41]), (1, short[6:7])],
        [(0, long[41:42]), (1, short[7:11])],
        [(0, long[42:45])],
    ]
    found = [step_logits for rows in plan for step_logits in driver.step(rows) or ()]
    return torch.cat(found).cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_device_computes_what_a_cpu_does(name: str, dtype: torch.dtype) -> None:
    expected = logits(name, "cpu", dtype)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(name, "cuda", dtype), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two devices")
def test_two_devices_compute_what_a_cpu_does(tmp_path: Path) -> None:
    tokens = random_tokens(30)
    directories = {name: str(tiny_model_dir(name.split("/")[0])) for name in SPLIT}
    args = (2, f"file://{tmp_path}/meeting", directories, tokens, f"{tmp_path}/logits.pt", "cuda")
    torch.multiprocessing.spawn(run_rank, args=args, nprocs=2)
    found = torch.load(tmp_path / "logits.pt")
    for name, directory in directories.items():
        expected = run_model(name, Path(directory), tokens, ProcessGroups.single())
        assert expected is not None
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
