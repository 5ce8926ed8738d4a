"""Which dtype a layer's tensors are held in while they are loaded."""

import pytest
import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups


@pytest.mark.parametrize(
    ("stored", "computed", "expected"),
    [
        ((torch.bfloat16,), torch.float32, torch.bfloat16),
        ((torch.bfloat16,), torch.bfloat16, torch.bfloat16),
        ((torch.float32,), torch.bfloat16, torch.bfloat16),
        ((torch.float16,), torch.bfloat16, torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32, torch.float32),
        ((None,), torch.float32, torch.float32),
        ((), torch.float32, torch.float16),
    ],
)
def test_weights_stay_narrow_only_where_that_loses_nothing(
    stored: tuple[torch.dtype | None, ...], computed: torch.dtype, expected: torch.dtype
) -> None:
    context = LayerContext(
        ops=torch_table("test"),
        groups=ProcessGroups.single(),
        dtype=computed,
        device=torch.device("cpu"),
        name="layer",
        weight_dtype=torch.float16,
        stored_dtypes={"other": torch.float32, **{f"layer.{i}": dtype for i, dtype in enumerate(stored)}},
    )
    assert context.storage_dtype([str(i) for i in range(len(stored))] or ["absent"]) == expected
