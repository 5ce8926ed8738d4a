from __future__ import annotations

from atom_cluster.config.facts import ModelFacts
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.published import published_model, published_models
from atom_cluster.models.registry import ARCHITECTURES, spec_from_config


def test_every_published_model_is_one_that_can_be_served() -> None:
    models = published_models()
    assert len(models) >= 8
    for model in models:
        spec = spec_from_config(HfConfig(model.config))
        assert spec.architecture in ARCHITECTURES
        assert ModelFacts.from_config(model.config).max_positions == spec.max_positions
        assert model.source and model.num_parameters > 1e8


def test_a_name_stands_for_one_model() -> None:
    names = [name for model in published_models() for name in model.names]
    assert len(names) == len(set(names))
    found = published_model("deepseek-ai/DeepSeek-R1")
    assert found is not None and found.key == "deepseek_r1"
    assert published_model("owner/unheard-of") is None
