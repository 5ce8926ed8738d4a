"""The drafting layer of hybrid models drafts what transformers' does, and is left out when nobody asks for it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_layers import MtpModel

from atom_cluster.errors import ConfigError
from atom_cluster.models.registry import read_spec
from tests.draft_models import draft_model_dir
from tests.models.drafting import assert_drafting_layers_change_nothing_else, draft_logits, load
from tests.tiny_models import TINY_MODELS, random_tokens

NAMES = ["qwen3_next", "qwen3_5", "qwen3_5_moe_vision"]
TOKENS = random_tokens(42, seed=4)


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest) -> Path:
    return draft_model_dir(request.param)


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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_drafts_match(directory: Path, backend: str) -> None:
    model = load(directory, 1, backend)
    assert model.num_draft_layers == read_spec(directory).num_draft_layers == 1
    (found,) = draft_logits(model, TOKENS, [0, 17, 39, 40, 41])
    expected = reference_draft_logits(directory)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=TINY_MODELS[directory.name].tolerance, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layer(directory: Path) -> None:
    assert_drafting_layers_change_nothing_else(directory, 1, TOKENS)


def test_more_layers_than_there_are_cannot_be_built(directory: Path) -> None:
    with pytest.raises(ConfigError, match="drafting"):
        load(directory, 2)
