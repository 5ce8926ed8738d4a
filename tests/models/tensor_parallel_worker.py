"""One rank of the tensor-parallel parity test, in its own process. Imports no transformers: it starts quickly."""

from __future__ import annotations

from pathlib import Path

import torch

from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups
from tests.models.paged_driver import PagedDriver, make_context

MAX_MODEL_LEN = 128


def run_rank(rank: int, world_size: int, meeting: str, model_dirs: dict[str, str], tokens: list[int], out: str) -> None:
    """Runs every model; rank 0 saves {name: logits of all tokens}."""
    torch.set_num_threads(1)
    groups = ProcessGroups.connect(
        rank=rank, world_size=world_size, init_method=meeting, device=torch.device("cpu"), timeout_s=120
    )
    found = {}
    for name, directory in model_dirs.items():
        found[name] = run_model(Path(directory), tokens, groups, is_dummy=name.endswith("dummy"))
    groups.close()
    if rank == 0:
        torch.save(found, out)


def run_model(
    directory: Path, tokens: list[int], groups: ProcessGroups, *, is_dummy: bool = False
) -> torch.Tensor | None:
    """Logits of a prompt in two chunks and of two steps after it, in float64; None on ranks other than 0."""
    context = make_context(torch_table("test"), dtype=torch.float64, groups=groups)
    load_format = "dummy" if is_dummy else "safetensors"
    model = load_model(directory, context=context, max_model_len=MAX_MODEL_LEN, load_format=load_format, seed=5)
    driver = PagedDriver(model)
    cuts = (0, 9, len(tokens) - 2, len(tokens) - 1, len(tokens))
    steps = [driver.step([(0, tokens[start:end])]) for start, end in zip(cuts, cuts[1:])]
    if groups.tensor.rank != 0:
        assert steps == [None] * len(steps)
        return None
    return torch.cat([logits[0] for logits in steps])
