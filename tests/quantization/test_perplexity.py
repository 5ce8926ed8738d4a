"""What quantization costs on the small real model, in perplexity over its licence."""

from pathlib import Path

import pytest

from atom_cluster.config.quantization import QuantizationConfig
from benchmarks.perplexity import measure

REFERENCE = {512: 16.398, 1024: 14.2117}
"""transformers in float32."""


@pytest.mark.demo_model
@pytest.mark.parametrize("num_tokens", REFERENCE)
def test_float32_is_what_transformers_computes(demo_model: Path, num_tokens: int) -> None:
    found = measure(demo_model, demo_model / "LICENSE", num_tokens=num_tokens)
    assert found.perplexity == pytest.approx(REFERENCE[num_tokens], rel=1e-3)


@pytest.mark.demo_model
@pytest.mark.parametrize(("online", "most"), [("fp8", 1.03), ("int8", 1.03), ("int4", 1.08)])
def test_online_quantization_costs_little(demo_model: Path, online: str, most: float) -> None:
    quantization = QuantizationConfig.model_validate({"online": online})
    found = measure(demo_model, demo_model / "LICENSE", num_tokens=512, quantization=quantization)
    assert found.perplexity < REFERENCE[512] * most


@pytest.mark.demo_model
def test_a_float8_cache_costs_little(demo_model: Path) -> None:
    found = measure(demo_model, demo_model / "LICENSE", num_tokens=512, kv_dtype="fp8")
    assert found.perplexity < REFERENCE[512] * 1.03
