"""Loading is strict, reads slices, and reports everything at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atom_cluster.errors import WeightsError
from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.loader import load_weights, storage_dtype
from atom_cluster.weights.rules import CheckpointMap
from atom_cluster.weights.safetensors_reader import open_checkpoint
from tests.tiny_models import tiny_model_dir

A, B = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3)


class Model:
    """Two tensors, of which it takes two rows and the last column."""

    def __init__(self) -> None:
        self.rows, self.column = torch.zeros(2, 3), torch.zeros(2, 1)

    def checkpoint_map(self) -> CheckpointMap:
        parts = {
            "a": WeightPart(target=self.rows, full_shape=(4, 3), cut=(slice(1, 3),)),
            "b": WeightPart(target=self.column, full_shape=(2, 3), cut=(slice(None), slice(2, 3))),
        }
        return CheckpointMap(parts=parts, ignored=(r"layers\.\d+\.inv_freq",))

    def finish_loading(self) -> None:
        raise AssertionError("loading does not finish the model")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_slices_are_read_into_their_places(tmp_path: Path) -> None:
    model = Model()
    with open_checkpoint(save(tmp_path, {"a": A, "b": B, "layers.3.inv_freq": A})) as checkpoint:
        load_weights(model, checkpoint)
    assert torch.equal(model.rows, A[1:3])
    assert torch.equal(model.column, B[:, 2:])


def test_every_problem_is_named_in_one_error_and_nothing_is_read(tmp_path: Path) -> None:
    model = Model()
    tensors = {"b": A, "extra": A, "layers.x.inv_freq": A}
    with open_checkpoint(save(tmp_path, tensors)) as checkpoint, pytest.raises(WeightsError) as error:
        load_weights(model, checkpoint)
    assert str(error.value).splitlines()[1:] == [
        "  missing: a",
        "  unused: extra",
        "  unused: layers.x.inv_freq",
        "  wrong shape: b is [4, 3], the model needs [2, 3]",
    ]
    assert not model.column.any()


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": A.to(torch.int8), "b": B})
    with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError, match="unsupported dtype: a"):
        load_weights(Model(), checkpoint)


@pytest.mark.parametrize(
    ("stored", "computed", "expected"),
    [
        ({torch.bfloat16}, torch.float32, torch.bfloat16),
        ({torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({torch.float32}, torch.bfloat16, torch.bfloat16),
        ({torch.float16}, torch.bfloat16, torch.bfloat16),
        ({torch.bfloat16, torch.float32}, torch.float32, torch.float32),
    ],
)
def test_weights_stay_narrow_only_where_that_loses_nothing(
    tmp_path: Path, stored: set[torch.dtype], computed: torch.dtype, expected: torch.dtype
) -> None:
    folder = save(tmp_path, {str(dtype): A.to(dtype) for dtype in stored})
    with open_checkpoint(folder) as checkpoint:
        assert storage_dtype(checkpoint, computed) == expected


def test_a_checkpoint_of_several_files_is_read_through_its_index() -> None:
    folder = tiny_model_dir("llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = load_file(tiny_model_dir("llama") / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names == whole.keys()
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in whole.items())


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"a": A})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(WeightsError, match=r"b \(not in model"), open_checkpoint(tmp_path):
        pass
    index.write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    with pytest.raises(WeightsError, match=r"absent\.safetensors"), open_checkpoint(tmp_path):
        pass
    index.write_text("{}")
    with pytest.raises(WeightsError, match="not a checkpoint index"), open_checkpoint(tmp_path):
        pass


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(WeightsError, match="damaged"), open_checkpoint(tmp_path):
        pass
