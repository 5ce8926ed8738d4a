"""A checkpoint: a directory of safetensors files, read as one set of tensors. Knows no models.

Layouts: `model.safetensors.index.json` naming the file of each tensor, `model.safetensors` alone, or several files
without an index: those named `model*.safetensors`, or all when there are none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from atom_cluster.errors import WeightsError
from atom_cluster.weights.safetensors_file import PLAIN_FLOATS, SafetensorsFile, TensorEntry

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """An open checkpoint. Made by `open_checkpoint`, which closes the files."""

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self.directory = directory
        """Where it is, for logs."""
        index = _read_index(directory)
        paths = [directory / name for name in sorted(set(index.values()))] if index else _files_without_index(directory)
        self._file_by_name: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            files.callback(file.close)
            self._add(file, index)
        absent = [f"{name} (not in {file})" for name, file in index.items() if not self._is_in(name, file)]
        if absent:
            raise WeightsError(f"{directory / _INDEX} lists tensors that are not there: {', '.join(sorted(absent))}")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.entry(name).shape

    def dtype_name(self, name: str) -> str:
        """Dtype of a tensor as the format spells it."""
        return self.entry(name).dtype_name

    def float_dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, without reading it; None when it is no plain float."""
        return PLAIN_FLOATS.get(self.dtype_name(name))

    def file(self, name: str) -> SafetensorsFile:
        """Where a tensor is."""
        return self._file_by_name[name]

    def entry(self, name: str) -> TensorEntry:
        """What the file says of a tensor."""
        return self._file_by_name[name].tensors[name]

    def _add(self, file: SafetensorsFile, index: Mapping[str, str]) -> None:
        for name in file.tensors:
            if (other := self._file_by_name.get(name)) and index.get(name) not in (other.path.name, file.path.name):
                raise WeightsError(f"{other.path} and {file.path.name} both have a tensor {name}")
            if other is None or index.get(name) == file.path.name:
                self._file_by_name[name] = file

    def _is_in(self, name: str, file_name: str) -> bool:
        return name in self._file_by_name and self._file_by_name[name].path.name == file_name


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoint in `directory`, closed on leaving. Raises WeightsError when files are missing or damaged."""
    with ExitStack() as files:
        yield Checkpoint(directory, files)


def _read_index(directory: Path) -> dict[str, str]:
    """File of each tensor according to the index; empty without an index."""
    path = directory / _INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        return {str(name): Path(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{path} is not a checkpoint index: {exc!r}") from exc


def _files_without_index(directory: Path) -> list[Path]:
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    found = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not found:
        raise WeightsError(f"no checkpoint files: neither {directory / _SINGLE} nor any other *.safetensors")
    return found
