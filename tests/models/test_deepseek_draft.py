"""The layer that drafts behind a latent-attention model computes what the same layer of transformers does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from atom_cluster.errors import WeightsError
from atom_cluster.models.registry import read_spec
from tests.draft_models import draft_model_dir
from tests.models.drafting import assert_drafting_layers_change_nothing_else, draft_logits, load
from tests.tiny_models import random_tokens, reference_model, tiny_model_dir

NAMES = ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"]
TOKENS = random_tokens(42, seed=4)


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest) -> Path:
    return draft_model_dir(request.param)


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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_drafts_match(directory: Path, backend: str) -> None:
    model = load(directory, 1, backend)
    assert model.num_draft_layers == read_spec(directory).num_draft_layers == 1
    (found,) = draft_logits(model, TOKENS, [0, 17, 39, 40, 41])
    expected = reference_draft_logits(directory)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layer(directory: Path) -> None:
    assert_drafting_layers_change_nothing_else(directory, 1, TOKENS)


def test_a_drafting_layer_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.layers\.3\."):
        load(tiny_model_dir("deepseek_v3"), 1)
