"""What a layer holds while its parts compute."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from atom_cluster.layers.moe import SparseMoe
from atom_cluster.models.pre_norm_layer import PreNormLayer
from atom_cluster.models.registry import load_model
from atom_cluster.ops.select import torch_table
from tests.models.paged_driver import PagedDriver, make_context
from tests.tiny_models import random_tokens, tiny_model_dir


def test_the_product_before_attention_is_gone_while_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as wide as queries, keys and values, and experts need the most memory of a layer."""
    model = load_model(tiny_model_dir("qwen3_moe"), context=make_context(torch_table("test")), max_model_len=64)
    layers: Any = model.layers  # type: ignore[attr-defined]
    layer = next(layer for layer in layers if isinstance(layer.mlp, SparseMoe))
    assert isinstance(layer, PreNormLayer)
    products: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []
    behind_first, mlp = layer.attention.behind_first, layer.mlp

    def note_product(product: torch.Tensor, inputs: object) -> torch.Tensor:
        products.append(weakref.ref(product))
        found: torch.Tensor = behind_first(product, inputs)
        return found

    def note_left(x: torch.Tensor) -> torch.Tensor:
        left.append(products[-1]() is not None)
        found: torch.Tensor = mlp(x)
        return found

    monkeypatch.setattr(layer.attention, "behind_first", note_product)
    monkeypatch.setattr(layer, "mlp", note_left)
    PagedDriver(model).step([(0, random_tokens(5))])
    assert left == [False]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_norms_and_the_products_behind_them_are_one_call(name: str) -> None:
    """With every version of Python: the product is not there yet when a layer is made."""
    model: Any = load_model(tiny_model_dir(name), context=make_context(torch_table("test")), max_model_len=64)
    assert all(layer._attention_starts_with_product for layer in model.layers)
    for layer in model.layers:
        assert layer._mlp_starts_with_product is not isinstance(layer.mlp, SparseMoe)
