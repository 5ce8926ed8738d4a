"""A directory of files is one checkpoint; what is damaged or contradicts itself is refused by name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atom_cluster.errors import WeightsError
from atom_cluster.parallel.sharding import whole
from atom_cluster.weights.loader import load_weights
from atom_cluster.weights.rules import CheckpointMap, LoadableModel
from atom_cluster.weights.safetensors_reader import Checkpoint, open_checkpoint
from tests.tiny_models import tiny_model_dir

A, B = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3)


class Everything(LoadableModel):
    """Takes all tensors of a checkpoint as they are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = {
            name: torch.zeros(checkpoint.shape(name), dtype=checkpoint.float_dtype(name)) for name in checkpoint.names
        }

    def checkpoint_map(self) -> CheckpointMap:
        return CheckpointMap(parts={name: whole(tensor) for name, tensor in self.tensors.items()})


def read(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        model = Everything(checkpoint)
        load_weights(model, checkpoint)
        return model.tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_file(folder: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return folder


def test_a_checkpoint_of_several_files_is_read_through_its_index() -> None:
    folder = tiny_model_dir("llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(read(folder), load_file(tiny_model_dir("llama") / "model.safetensors"))


def test_several_files_need_no_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": B}, tmp_path / "consolidated.safetensors")
    assert_equal(read(tmp_path), {"a": A, "b": B})


def test_files_may_have_any_name_when_there_are_no_others(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "pytorch_model.safetensors")
    assert_equal(read(tmp_path), {"a": A})


def test_the_index_decides_between_files_and_without_one_nobody_does(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model-1.safetensors")
    save_file({"a": A + 1}, tmp_path / "model-2.safetensors")
    with pytest.raises(WeightsError, match=r"model-1\.safetensors and model-2\.safetensors both have a tensor a"):
        read(tmp_path)
    for file, expected in (("model-1.safetensors", A), ("model-2.safetensors", A + 1)):
        write_index(tmp_path, {"a": file, "b": "model-1.safetensors"})
        assert torch.equal(read(tmp_path)["a"], expected)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "model.safetensors", "b": "model.safetensors"})
    with pytest.raises(WeightsError, match=r"b \(not in model"):
        read(tmp_path)
    write_index(tmp_path, {"a": "absent.safetensors"})
    with pytest.raises(WeightsError, match=r"no checkpoint file .*absent\.safetensors"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="not a checkpoint index"):
        read(tmp_path)


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no checkpoint files"):
        read(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [-8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0, 8, 16]}},
        {"a": {**ENTRY, "data_offsets": [4, 12]}},
        {"a": {**ENTRY, "dtype": "Q4", "data_offsets": [0, 9]}},
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        read(write_file(tmp_path, header, b"\0" * 8))


@pytest.mark.parametrize("content", [b"", b"\0" * 5, b"\xff" * 64, struct.pack("<Q", 4) + b"{\xff}}", b"\0" * 64])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        read(tmp_path)


def test_a_file_that_was_not_copied_whole_is_refused(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged.*a ends at"):
        read(tmp_path)


def test_dtypes_that_cannot_be_loaded_do_not_keep_the_others_from_it(tmp_path: Path) -> None:
    header = {"a": ENTRY, "b": {"dtype": "F4", "shape": [4], "data_offsets": [8, 10]}}
    with open_checkpoint(write_file(tmp_path, header, b"\0" * 10)) as checkpoint:
        assert (checkpoint.dtype_name("a"), checkpoint.dtype_name("b")) == ("F32", "F4")
        assert checkpoint.float_dtype("b") is None
