"""Plain weights: one tensor per layer, applied by the op backend."""

import torch

from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.sharding import Share
from atom_cluster.quantization.scheme import LinearShape
from atom_cluster.quantization.unquantized import UNQUANTIZED


def test_the_weight_is_stored_in_its_dtype_and_applied_in_that_of_activations() -> None:
    shape = LinearShape(outputs=(Share.whole(1), Share.whole(3)), inputs=Share.whole(3))
    stored = UNQUANTIZED.create_tensors(shape, dtype=torch.bfloat16, device=torch.device("cpu"))
    tensors = {name: item.tensor for name, item in stored.items()}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "weight": ((4, 3), torch.bfloat16)
    }
    tensors["weight"].copy_(torch.arange(12).view(4, 3))
    op = UNQUANTIZED.prepare(tensors, torch.ones(4), shape=shape, ops=torch_table("test"), dtype=torch.float32)
    assert op(torch.eye(3)[:1]).tolist() == [[1.0, 4.0, 7.0, 10.0]]
