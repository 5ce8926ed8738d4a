"""Models with drafting layers on the CPU, and what these layers draft."""

from __future__ import annotations

from pathlib import Path

import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context


def load(directory: Path, num_draft_layers: int, backend: str = "cpu") -> CausalLM:
    """In float32, with so many drafting layers."""
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    return load_model(directory, context=make_context(ops), max_model_len=64, num_draft_layers=num_draft_layers)


@torch.inference_mode()
def draft_logits(model: CausalLM, tokens: list[int], cuts: list[int]) -> list[torch.Tensor]:
    """Logits of each drafting layer, given the tokens behind, in steps that begin and end at `cuts`."""
    driver = PagedDriver(model)
    found: list[list[torch.Tensor]] = [[] for _ in range(model.num_draft_layers)]
    for start, end in zip(cuts, cuts[1:]):
        batch = driver.batch([(0, tokens[start:end])])
        hidden = model.forward(batch)
        for index in range(model.num_draft_layers):
            behind = torch.tensor(tokens[start + 1 + index : end + 1 + index])
            hidden = model.forward_draft(index, behind, hidden, batch)
            found[index].append(model.compute_draft_logits(index, hidden).gather())
    return [torch.cat(logits) for logits in found]


def assert_drafting_layers_change_nothing_else(directory: Path, num_draft_layers: int, tokens: list[int]) -> None:
    """The model says the same with its drafting layers as without, which then need no cache."""
    with_draft, without = load(directory, num_draft_layers), load(directory, 0)
    assert len(with_draft.kv_layout.layers) > len(without.kv_layout.layers)
    found = [PagedDriver(model).step([(0, tokens)]) for model in (with_draft, without)]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0][0], found[1][0])
