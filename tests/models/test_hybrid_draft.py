"""The drafting layer of hybrid models drafts what transformers' does, and is left out when nobody asks for it."""

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
from atom_cluster.errors import ConfigError
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import load_model, read_spec
from atom_cluster.ops.select import select_ops
from atom_cluster.platform.detect import detect_platform
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import TINY_MODELS, random_tokens, tiny_model_dir

NAMES = ["qwen3_next", "qwen3_5", "qwen3_5_moe_vision"]
TOKENS = random_tokens(42, seed=4)


@cache
def checkpoint_with_draft_layer(name: str, parent: Path) -> Path:
    """The tiny checkpoint, and a drafting layer of random numbers shaped like its last layer, full attention.

    The multimodal one has its experts in stacks, as published checkpoints do.
    """
    directory = parent / name
    shutil.copytree(tiny_model_dir(name), directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    last = next(key for key in tensors if "layers.3." in key).split("layers.3.")[0] + "layers.3."
    shapes = {key.replace(last, "mtp.layers.0."): value.shape for key, value in tensors.items() if last in key}
    shapes |= {f"mtp.{norm}.weight": (64,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (64, 128)
    if name == "qwen3_5_moe_vision":
        shapes = {key: shape for key, shape in shapes.items() if ".experts." not in key}
        shapes |= {
            "mtp.layers.0.mlp.experts.gate_up_proj": (8, 64, 64),
            "mtp.layers.0.mlp.experts.down_proj": (8, 64, 32),
        }
    for key, shape in sorted(shapes.items()):
        tensors[key] = torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    text_config = config.get("text_config", config)
    text_config |= {"mtp_num_hidden_layers": 1, "num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with_draft_layer(request.param, tmp_path_factory.getbasetemp())


def load(directory: Path, backend: str, num_draft_layers: int) -> CausalLM:
    ops = select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)
    return load_model(directory, context=make_context(ops), max_model_len=64, num_draft_layers=num_draft_layers)


@torch.inference_mode()
def reference_draft_logits(directory: Path) -> torch.Tensor:
    """transformers' logits of the tokens drafted behind all tokens but the last, given their successors."""
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32).eval()
    draft = MtpModel.from_pretrained(model).eval()
    hidden = model.model(torch.tensor([TOKENS])).last_hidden_state[:, :-1]
    successors = torch.tensor([TOKENS[1:]])
    positions = torch.arange(1, len(TOKENS))[None]
    drafted = draft.forward_layer(0, hidden, positions, None, input_ids=successors)
    logits: torch.Tensor = model.lm_head(drafted)[0]
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
    torch.testing.assert_close(found, expected, atol=TINY_MODELS[directory.name].tolerance, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layer(directory: Path) -> None:
    with_draft, without = load(directory, "cpu", num_draft_layers=1), load(directory, "cpu", num_draft_layers=0)
    assert len(with_draft.kv_layout.layers) == len(without.kv_layout.layers) + 1
    found = [PagedDriver(model).step([(0, TOKENS)]) for model in (with_draft, without)]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0][0], found[1][0])


def test_more_layers_than_there_are_cannot_be_built(directory: Path) -> None:
    with pytest.raises(ConfigError, match="drafting"):
        load(directory, "cpu", num_draft_layers=2)
