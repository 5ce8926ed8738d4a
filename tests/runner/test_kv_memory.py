from __future__ import annotations

import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout, StateLayerLayout, StateTensor
from atom_cluster.layers.forward_batch import KvLayerCache, StateLayerCache
from atom_cluster.runner import kv_memory
from atom_cluster.runner.kv_memory import KvMemory, allocate_kv_memory

CPU = torch.device("cpu")
LAYOUT = KvLayout(
    layers=(
        KvLayerLayout(num_kv_heads=1, key_dim=3, value_dim=0, dtype="float8_e4m3fn"),
        KvLayerLayout(num_kv_heads=2, key_dim=8, value_dim=4, dtype="bfloat16"),
        StateLayerLayout(
            tensors=(
                StateTensor(name="state", shape=(2, 3), dtype="float32"),
                StateTensor(name="conv", shape=(5,), dtype="bfloat16"),
            )
        ),
        KvLayerLayout(num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32", window=7),
        KvLayerLayout(num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32"),
    ),
)
NUM_PAGES = (3, 4, 2)
"""Full, window, states."""


def allocate() -> KvMemory:
    return allocate_kv_memory(LAYOUT, num_pages=NUM_PAGES, block_size=5, device=CPU)


def views_of(memory: KvMemory) -> list[torch.Tensor]:
    views: list[torch.Tensor] = []
    for layer in memory.layers:
        views += layer.tensors.values() if isinstance(layer, StateLayerCache) else (layer.key, layer.value)
    return views


def test_layers_have_the_shapes_of_the_layout_and_the_pages_of_their_group_and_a_spare_one() -> None:
    memory = allocate()
    assert [type(layer) for layer in memory.layers] == [KvLayerCache, KvLayerCache, StateLayerCache] + [
        KvLayerCache
    ] * 2
    assert [tuple(view.shape) for view in views_of(memory)] == [
        (4, 5, 1, 3),
        (4, 5, 1, 0),
        (4, 5, 2, 8),
        (4, 5, 2, 4),
        (3, 2, 3),
        (3, 5),
        (5, 5, 1, 4),
        (5, 5, 1, 4),
        (4, 5, 1, 4),
        (4, 5, 1, 4),
    ]


def test_views_are_zeroed_disjoint_and_within_the_memory() -> None:
    memory = allocate()
    assert all(bool((view.float() == 0).all()) for view in views_of(memory))
    for number, view in enumerate(views_of(memory), start=1):
        view.copy_(torch.full(view.shape, float(number)).to(view.dtype))
    assert all(bool((view.float() == number).all()) for number, view in enumerate(views_of(memory), start=1))
    # Full: 5 tokens of 3 + 48 + 32 bytes; a state: 24 + 10 bytes; each padded to 16.
    assert [region.blocks.shape for region in memory.regions] == [(3, 416), (4, 160), (2, 48)]
    assert memory.num_bytes == 4 * 416 + 5 * 160 + 3 * 48, "each has a spare page"


def test_every_tensor_of_every_page_is_aligned_to_its_dtype() -> None:
    for view in filter(torch.numel, views_of(allocate())):
        assert view.data_ptr() % view.element_size() == 0
        assert (view.stride(0) * view.element_size()) % 16 == 0


def test_a_page_is_one_contiguous_piece_of_the_size_the_layout_says() -> None:
    memory = allocate()
    assert [region.name for region in memory.regions] == ["0 full", "1 window 7", "2 state"]
    for region, group in zip(memory.regions, LAYOUT.groups, strict=True):
        assert region.blocks[1].is_contiguous()
        assert region.block_bytes == LAYOUT.page_bytes(group, 5)


def test_without_shared_memory_it_is_private_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> torch.Tensor:
        raise TransferError("no memfd here")

    monkeypatch.setattr(kv_memory, "allocate_shared", refuse)
    memory = allocate()
    assert memory.choice == "private memory: no memfd here"
    assert memory.regions[0].blocks.shape[0] == 3
