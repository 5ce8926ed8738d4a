"""Rotary frequencies equal those of transformers for every kind."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atom_cluster.layers.rotary import RotaryTable, inverse_frequencies
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.rope_config import read_rope

SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn with options": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn with its own temperature": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_temperature_match(name: str) -> None:
    parameters = {"rope_type": name, "rope_theta": 5e5, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    spec = read_rope(HfConfig({"rope_parameters": parameters, "max_position_embeddings": 131072}), head_dim=128)
    torch.testing.assert_close(inverse_frequencies(spec), expected, rtol=1e-6, atol=0)
    assert spec.attention_factor == pytest.approx(attention_factor)


def test_a_table_row_is_the_cosine_and_signed_sine_of_its_position() -> None:
    spec = read_rope(HfConfig({"rope_theta": 100.0}), head_dim=4)
    table = RotaryTable(spec, num_positions=8, dtype=torch.bfloat16, device=torch.device("cpu"))
    cos, sin = table.at(torch.tensor([3, 0]))
    angle = torch.tensor([3.0, 0.3])
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0], angle.cos().repeat(2))
    torch.testing.assert_close(sin[0, 0], torch.cat((-angle.sin(), angle.sin())))
    assert torch.equal(sin[1, 0], torch.zeros(4))
