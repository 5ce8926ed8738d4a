"""Layers for multi-token prediction behind a model's own draft what transformers' do, from the first or in a chain."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_layers import MtpModel

from atom_cluster.errors import WeightsError
from atom_cluster.models.registry import read_spec
from tests.draft_models import draft_model_dir
from tests.models.drafting import assert_drafting_layers_change_nothing_else, draft_logits, load
from tests.tiny_models import random_tokens, tiny_model_dir

NUM_DRAFT_LAYERS = 2
TOKENS = random_tokens(42, seed=4)


@pytest.fixture
def directory() -> Path:
    return draft_model_dir("glm4_moe")


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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("num_draft_layers", [1, 2])
def test_drafts_match(directory: Path, num_draft_layers: int, backend: str) -> None:
    assert read_spec(directory).num_draft_layers == NUM_DRAFT_LAYERS
    found = draft_logits(load(directory, num_draft_layers, backend), TOKENS, [0, 17, 38, 39, 40])
    assert len(found) == num_draft_layers
    for logits, expected in zip(found, reference_logits(directory)):
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected[:40], atol=1e-5, rtol=0)


def test_what_the_model_says_does_not_depend_on_its_drafting_layers(directory: Path) -> None:
    assert_drafting_layers_change_nothing_else(directory, 1, TOKENS)


def test_drafting_layers_that_the_checkpoint_lacks_are_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.layers\.3\."):
        load(tiny_model_dir("glm4_moe"), 1)
