"""What a rank says of its memory is what its tensors take."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.ops.cpu.linear import PackedLinear
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.runner.start_facts import weight_bytes
from tests.tiny_models import reference_model, tiny_model_dir


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_weights_and_kv_are_counted_once(family: str) -> None:
    directory = tiny_model_dir(family)
    runner = build_model_runner(
        RunnerOptions(
            model_dir=str(directory),
            dtype="float64",
            device="cpu",
            block_size=8,
            num_blocks=32,
            max_num_requests=4,
            max_model_len=64,
            num_threads=1,
        )
    )
    start = runner.info.start
    runner.close()
    reference = reference_model(family)
    num_weights = sum(weight.numel() for weight in reference.parameters())
    num_embedded = reference.get_input_embeddings().weight.numel()
    # Embeddings stay as the checkpoint has them, in float32. Tables of rotary angles are no weights, but the model's.
    expected = 8 * (num_weights - num_embedded) + 4 * num_embedded
    assert expected <= start.weight_bytes < 1.05 * expected
    assert start.kv_bytes > 0 and start.num_graphs == start.num_pieces == start.graph_bytes == 0
    assert set(start.parts_s) == {"join", "load", "cache", "capture"}


def test_what_a_library_packed_counts_as_packed() -> None:
    op = PackedLinear(torch.zeros(16, 8), None)
    assert weight_bytes(op) == 2 * 16 * 8


def test_views_of_the_same_memory_count_once() -> None:
    base = torch.zeros(100)
    assert weight_bytes([base, base[:50], {"again": base.view(10, 10)}, (torch.zeros(3, dtype=torch.int8),)]) == 403
