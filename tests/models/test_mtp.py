"""Layers for multi-token prediction behind a model's own draft what transformers' do, from the first or in a chain."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import WeightsError
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import load_model, read_spec
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import random_tokens, tiny_model_dir

NUM_LAYERS, NUM_DRAFT_LAYERS, HIDDEN_SIZE = 3, 2, 64
TOKENS = random_tokens(42, seed=4)


@cache
def checkpoint_with_draft_layers(parent: Path) -> Path:
    """A tiny GLM-4-MoE with two layers behind the last, of its shapes, and copies of embedding and head of no use."""
    directory = parent / "glm4_moe_mtp"
    shutil.copytree(tiny_model_dir("glm4_moe"), directory)
    tensors = load_file(directory / "model.safetensors")
    last, generator = f"model.layers.{NUM_LAYERS - 1}.", torch.Generator().manual_seed(3)
    for number in range(NUM_LAYERS, NUM_LAYERS + NUM_DRAFT_LAYERS):
        prefix = f"model.layers.{number}."
        shapes = {key.replace(last, prefix): value.shape for key, value in tensors.items() if key.startswith(last)}
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN_SIZE,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{prefix}eh_proj.weight"] = (HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        for key, shape in sorted(shapes.items()):
            tensors[key] = torch.randn(shape, generator=generator) * 0.1 + ("norm" in key)
        for copy in ("embed_tokens", "shared_head.head"):
            tensors[f"{prefix}{copy}.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": NUM_DRAFT_LAYERS}))
    return directory


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with_draft_layers(tmp_path_factory.getbasetemp())


def load(directory: Path, num_draft_layers: int, backend: str = "cpu") -> CausalLM:
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    return load_model(directory, context=make_context(ops), max_model_len=64, num_draft_layers=num_draft_layers)


@torch.inference_mode()
def reference_logits(directory: Path) -> list[torch.Tensor]:
    """transformers' logits of each drafting layer, given the tokens behind; of all tokens that have enough behind."""
    model_class = transformers.Glm4MoeForCausalLM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])
        model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
        draft = MtpModel.from_pretrained(model).eval()
    hidden, found = model.model(torch.tensor([TOKENS])).last_hidden_state, []
    for index in range(NUM_DRAFT_LAYERS):
        positions = torch.arange(1 + index, len(TOKENS))[None]
        behind = torch.tensor([TOKENS[1 + index :]])
        hidden = draft.forward_layer(index, hidden[:, :-1], positions, None, input_ids=behind)
        found.append(model.lm_head(hidden)[0])
    return found


@torch.inference_mode()
def draft_logits(model: CausalLM, cuts: list[int]) -> list[torch.Tensor]:
    """The same by `model`, in steps that begin and end at `cuts`."""
    driver = PagedDriver(model)
    found: list[list[torch.Tensor]] = [[] for _ in range(model.num_draft_layers)]
    for start, end in zip(cuts, cuts[1:]):
        batch = driver.batch([(0, TOKENS[start:end])])
        hidden = model.forward(batch)
        for index in range(model.num_draft_layers):
            behind = torch.tensor(TOKENS[start + 1 + index : end + 1 + index])
            hidden = model.forward_draft(index, behind, hidden, batch)
            logits = model.compute_draft_logits(index, hidden)
            assert logits is not None
            found[index].append(logits)
    return [torch.cat(logits) for logits in found]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("num_draft_layers", [1, 2])
def test_drafts_match(directory: Path, num_draft_layers: int, backend: str) -> None:
    assert read_spec(directory).num_draft_layers == NUM_DRAFT_LAYERS
    found = draft_logits(load(directory, num_draft_layers, backend), [0, 17, 38, 39, 40])
    assert len(found) == num_draft_layers
    for logits, expected in zip(found, reference_logits(directory)):
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected[:40], atol=1e-5, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layers(directory: Path) -> None:
    with_draft, without = load(directory, 1), load(directory, 0)
    assert len(with_draft.kv_layout.layers) == len(without.kv_layout.layers) + 1 == NUM_LAYERS + 1
    found = [PagedDriver(model).step([(0, TOKENS)]) for model in (with_draft, without)]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0][0], found[1][0])


def test_drafting_layers_that_the_checkpoint_lacks_are_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.layers\.3\."):
        load(tiny_model_dir("glm4_moe"), 1)
