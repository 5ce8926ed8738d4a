"""One rank of the tensor-parallel parity test, in its own process. Imports no transformers: it starts quickly."""

from __future__ import annotations

from pathlib import Path

import torch

from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups
from tests.models.paged_driver import PagedDriver, make_context

MAX_MODEL_LEN = 128


def run_rank(
    rank: int,
    world_size: int,
    meeting: str,
    model_dirs: dict[str, str],
    tokens: list[int],
    out: str,
    device_type: str = "cpu",
) -> None:
    """Runs every model; rank 0 saves {name: logits of all tokens}.

    Behind a model's name: /experts for ranks that divide whole experts among them, and what `run_model` knows.
    """
    torch.set_num_threads(1)
    device = "cpu" if device_type == "cpu" else f"{device_type}:{rank}"
    if device != "cpu":
        torch.cuda.set_device(device)
    groups = ProcessGroups.connect(
        rank=rank, world_size=world_size, init_method=meeting, device=torch.device(device), timeout_s=120
    )
    found = {}
    dividing_experts = ProcessGroups(groups.tensor, groups.tensor)
    for name, directory in model_dirs.items():
        groups_of_model = dividing_experts if "/experts" in name else groups
        found[name] = run_model(name, Path(directory), tokens, groups_of_model, device)
    groups.close()
    if rank == 0:
        torch.save(found, out)


def run_model(
    name: str, directory: Path, tokens: list[int], groups: ProcessGroups, device: str = "cpu"
) -> torch.Tensor:
    """Logits of a prompt in two chunks and of two steps after it, in float64.

    Behind the model's name: /dummy for dummy weights, /draft for logits of its first drafting layer as well.
    """
    context = make_context(torch_table("test"), dtype=torch.float64, groups=groups, device=device)
    model = load_model(
        directory,
        context=context,
        max_model_len=MAX_MODEL_LEN,
        num_draft_layers=1 if "/draft" in name else 0,
        load_format="dummy" if "/dummy" in name else "safetensors",
        seed=5,
    )
    driver = PagedDriver(model, device=device)
    cuts = (0, 9, len(tokens) - 2, len(tokens) - 1, len(tokens))
    steps = [driver.step([(0, tokens[start:end])]) for start, end in zip(cuts, cuts[1:])]
    if model.num_draft_layers:
        steps.append(draft(model, tokens, device))
    return torch.cat([logits[0].cpu() for logits in steps])


@torch.inference_mode()
def draft(model: CausalLM, tokens: list[int], device: str) -> list[torch.Tensor]:
    """Logits drafted behind all tokens but the last, in one step."""
    batch = PagedDriver(model, device=device).batch([(0, tokens[:-1])])
    hidden = model.forward_draft(0, torch.tensor(tokens[1:], device=device), model.forward(batch), batch)
    return [model.compute_draft_logits(0, hidden).gather()]
