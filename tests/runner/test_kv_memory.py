import pytest
import torch

from atom_cluster.errors import ConfigError, TransferError
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.runner import kv_memory
from atom_cluster.runner.kv_memory import allocate_kv_memory, blocks_that_fit

CPU = torch.device("cpu")
LAYOUT = KvLayout(
    layers=(
        KvLayerLayout(num_kv_heads=2, key_dim=8, value_dim=4, dtype="bfloat16"),
        KvLayerLayout(num_kv_heads=1, key_dim=4, value_dim=4, dtype="bfloat16"),
    ),
)


def test_layers_are_disjoint_views_that_cover_the_memory() -> None:
    memory = allocate_kv_memory(LAYOUT, num_blocks=3, block_size=5, device=CPU)
    views = [view for layer in memory.layers for view in (layer.key, layer.value)]
    assert [tuple(view.shape) for view in views] == [(3, 5, 2, 8), (3, 5, 2, 4), (3, 5, 1, 4), (3, 5, 1, 4)]
    for number, view in enumerate(views, start=1):
        assert bool((view == 0).all())
        view += number
    assert sum(view.nbytes for view in views) == memory.blocks.nbytes
    assert all(bool((view == number).all()) for number, view in enumerate(views, start=1))


def test_a_block_is_one_contiguous_piece_of_the_size_the_layout_says() -> None:
    memory = allocate_kv_memory(LAYOUT, num_blocks=3, block_size=5, device=CPU)
    (region,) = memory.regions
    assert region.blocks[1].is_contiguous()
    assert region.block_bytes == LAYOUT.page_bytes(LAYOUT.groups[0], 5)


def test_without_shared_memory_it_is_private_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> torch.Tensor:
        raise TransferError("no memfd here")

    monkeypatch.setattr(kv_memory, "allocate_shared", refuse)
    memory = allocate_kv_memory(LAYOUT, num_blocks=3, block_size=5, device=CPU)
    assert memory.choice == "private memory: no memfd here"
    assert memory.blocks.shape[0] == 3


def test_blocks_that_fit_rounds_down() -> None:
    per_block = LAYOUT.page_bytes(LAYOUT.groups[0], 16)
    assert blocks_that_fit(LAYOUT, block_size=16, budget_bytes=10 * per_block - 1) == 9


def test_a_budget_for_less_than_two_blocks_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(ConfigError, match="cpu_cache_gib"):
        blocks_that_fit(LAYOUT, block_size=16, budget_bytes=LAYOUT.page_bytes(LAYOUT.groups[0], 16))
