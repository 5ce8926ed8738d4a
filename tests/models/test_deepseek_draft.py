"""The layer that drafts behind a latent-attention model computes what the same layer of transformers does."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from atom_cluster.config.ops import OpsConfig
from atom_cluster.errors import WeightsError
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import load_model, read_spec
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import random_tokens, reference_model, tiny_model_dir

NAMES = ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"]
TOKENS = random_tokens(42, seed=4)


@cache
def checkpoint_with_draft_layer(name: str, parent: Path) -> Path:
    """The tiny checkpoint, and behind its layers one for drafting, of random numbers. It has its own indexer."""
    directory = parent / name
    shutil.copytree(tiny_model_dir(name), directory)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    number, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, prefix = f"model.layers.{number - 1}.", f"model.layers.{number}."
    shapes = {key.replace(last, prefix): value.shape for key, value in tensors.items() if key.startswith(last)}
    first = "model.layers.0.self_attn.indexer."
    shapes |= {
        key.replace("layers.0.", f"layers.{number}."): t.shape for key, t in tensors.items() if key.startswith(first)
    }
    shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden)
    generator = torch.Generator().manual_seed(3)
    for key, shape in sorted(shapes.items()):
        tensors[key] = torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm.weight" in key else 0.0)
    # Copies of the main model's, which are not looked at.
    tensors[f"{prefix}embed_tokens.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], torch.nan)
    tensors[f"{prefix}shared_head.head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return directory


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with_draft_layer(request.param, tmp_path_factory.getbasetemp())


def load(directory: Path, backend: str, num_draft_layers: int) -> CausalLM:
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    return load_model(directory, context=make_context(ops), max_model_len=64, num_draft_layers=num_draft_layers)


@torch.inference_mode()
def reference_draft_logits(directory: Path) -> torch.Tensor:
    """Of the tokens drafted behind all tokens but the last: the layer as the only one of a model by transformers."""
    config = AutoConfig.from_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{config.num_hidden_layers}."
    alone = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]}
    alone |= {"indexer_types": ["full"], "layer_types": getattr(config, "layer_types", None) and config.layer_types[:1]}
    for key, value in alone.items():
        setattr(config, key, value)
    kept = {
        "model.embed_tokens.": "model.embed_tokens.",
        "lm_head.": "lm_head.",
        f"{prefix}shared_head.norm": "model.norm",
    }
    kept |= {f"{prefix}{part}": f"model.layers.0.{part}" for part in ("self_attn.", "mlp.", "input_", "post_")}
    only = {key.replace(a, b): tensor for key, tensor in tensors.items() for a, b in kept.items() if key.startswith(a)}
    folder = directory.parent / f"{directory.name}-draft-alone"
    folder.mkdir(exist_ok=True)
    save_file(only, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    layer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hidden = reference_model(directory.name).model(torch.tensor([TOKENS])).last_hidden_state[0, :-1]
    embedded = tensors["model.embed_tokens.weight"][TOKENS[1:]]
    normed = [
        torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"{prefix}{norm}.weight"], config.rms_norm_eps)
        for norm, x in (("enorm", embedded), ("hnorm", hidden))
    ]
    inputs = torch.cat(normed, -1) @ tensors[f"{prefix}eh_proj.weight"].T
    logits: torch.Tensor = layer(inputs_embeds=inputs[None]).logits[0]
    return logits


@torch.inference_mode()
def draft_logits(model: CausalLM, cuts: list[int]) -> torch.Tensor:
    driver, found = PagedDriver(model), []
    for start, end in zip(cuts, cuts[1:]):
        batch = driver.batch([(0, TOKENS[start:end])])
        hidden = model.forward(batch)
        hidden = model.forward_draft(0, torch.tensor(TOKENS[start + 1 : end + 1]), hidden, batch)
        logits = model.compute_draft_logits(0, hidden)
        assert logits is not None
        found.append(logits)
    return torch.cat(found)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_drafts_match(directory: Path, backend: str) -> None:
    model = load(directory, backend, num_draft_layers=1)
    assert model.num_draft_layers == read_spec(directory).num_draft_layers == 1
    found = draft_logits(model, [0, 17, 39, 40, 41])
    expected = reference_draft_logits(directory)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layer(directory: Path) -> None:
    with_draft, without = load(directory, "cpu", num_draft_layers=1), load(directory, "cpu", num_draft_layers=0)
    assert len(with_draft.kv_layout.layers) > len(without.kv_layout.layers)
    found = [PagedDriver(model).step([(0, TOKENS)]) for model in (with_draft, without)]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0][0], found[1][0])


def test_a_drafting_layer_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.layers\.3\."):
        load(tiny_model_dir("deepseek_v3"), "cpu", num_draft_layers=1)
