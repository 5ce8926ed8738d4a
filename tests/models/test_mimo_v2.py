"""MiMo-V2-Flash as it is on the hub: other configuration keys, and layers that draft."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MiMoV2FlashForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import MiMoV2FlashDecoderLayer, MiMoV2FlashRMSNorm

from atom_cluster.errors import ConfigError
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.mimo_v2.spec import read_mimo_v2_spec
from atom_cluster.models.registry import read_spec
from tests.draft_models import MIMO_NORMS, draft_model_dir
from tests.models.drafting import draft_logits, load
from tests.models.paged_driver import PagedDriver
from tests.tiny_models import random_tokens, reference_logits, tiny_model_dir

TOKENS = random_tokens(43, seed=4)
NUM_DRAFT_LAYERS = 3


@pytest.fixture
def directory() -> Path:
    return draft_model_dir("mimo_v2")


@torch.inference_mode()
def reference_draft_logits(directory: Path) -> list[torch.Tensor]:
    """Of each drafting layer, from its description in transformers' blocks, given the tokens that follow.

    Layer i, at position p, has the model's hidden state there and the embedding of token p + 1 + i.
    """
    model = MiMoV2FlashForCausalLM.from_pretrained(tiny_model_dir("mimo_v2"), dtype=torch.float32).eval()
    tensors, config = load_file(directory / "model.safetensors"), model.config
    config.mlp_layer_types[1] = "dense"
    num_tokens = len(TOKENS) - NUM_DRAFT_LAYERS
    hidden = model.model(torch.tensor([TOKENS])).last_hidden_state[:, :num_tokens]
    positions = torch.arange(num_tokens)[None]
    angles = model.model.rotary_emb(hidden, positions, "sliding_attention")
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )
    found = []
    for index in range(NUM_DRAFT_LAYERS):
        prefix = f"model.mtp.layers.{index}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        norms = {name: MiMoV2FlashRMSNorm(64, config.rms_norm_eps) for name in MIMO_NORMS}
        for name, norm in norms.items():
            norm.weight.copy_(own.pop(f"{name}.weight"))
        join = own.pop("eh_proj.weight")
        own["self_attn.sinks"] = own.pop("self_attn.attention_sink_bias")
        own["post_attention_layernorm.weight"] = own.pop("pre_mlp_layernorm.weight")
        block = MiMoV2FlashDecoderLayer(config, 1).eval()
        block.load_state_dict(own)
        embedded = model.model.embed_tokens(torch.tensor([TOKENS[1 + index : 1 + index + num_tokens]]))
        x = torch.cat((norms["enorm"](embedded), norms["hnorm"](hidden)), -1) @ join.T
        x = block(x, position_embeddings=angles, attention_mask=mask)
        found.append(model.lm_head(norms["final_layernorm"](x))[0])
    return found


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_drafting_layers_match_their_description(directory: Path, backend: str) -> None:
    model = load(directory, NUM_DRAFT_LAYERS, backend)
    assert model.num_draft_layers == read_spec(directory).num_draft_layers == NUM_DRAFT_LAYERS
    found = draft_logits(model, TOKENS, [0, 17, 36, 39, 40])
    for logits, expected in zip(found, reference_draft_logits(directory), strict=True):
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_draft_layers", [0, 1, 3])
def test_the_hubs_spelling_is_the_same_model_however_many_layers_draft(directory: Path, num_draft_layers: int) -> None:
    model = load(directory, num_draft_layers)
    (logits,) = PagedDriver(model).step([(0, TOKENS)])
    torch.testing.assert_close(logits, reference_logits("mimo_v2", TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern"),
        ({"hybrid_layer_pattern": [0, 1, 2]}, "hybrid_layer_pattern"),
        ({"moe_layer_freq": [1, 1, 4]}, "moe_layer_freq"),
        ({"moe_layer_freq": None, "mlp_layer_types": ["dense", "dense"]}, "mlp_layer_types"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_what_cannot_run_is_refused_by_name(directory: Path, change: dict[str, object], named: str) -> None:
    config = HfConfig.read(directory)
    with pytest.raises(ConfigError, match=named):
        read_mimo_v2_spec(HfConfig({**config.values, **change}))
