"""Reads tensors, or slices of them, from a directory of safetensors files through memory maps. Knows no models.

Layouts: `model.safetensors`, or `model.safetensors.index.json` naming the file of each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from atom_cluster.errors import WeightsError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Checkpoint:
    """An open checkpoint. Only bytes that are read are loaded. Made by `open_checkpoint`, which closes the files."""

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self._handles = {}
        self._file_by_name: dict[str, str] = {}
        listed = _listed_files(directory)
        for file_name in sorted(set(listed.values())) if listed else [_SINGLE]:
            self._handles[file_name] = files.enter_context(_open(directory / file_name))
            self._file_by_name.update(dict.fromkeys(self._handles[file_name].keys(), file_name))
        absent = [f"{name} (not in {file})" for name, file in listed.items() if self._file_by_name.get(name) != file]
        if absent:
            raise WeightsError(f"{directory / _INDEX} lists tensors that are not there: {', '.join(sorted(absent))}")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def float_dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, without reading it; None when it is no plain float."""
        return _FLOAT_DTYPES.get(self._slice(name).get_dtype())

    def read(self, name: str, cut: tuple[slice, ...] = ()) -> torch.Tensor:
        """A tensor, or what `cut` takes of its leading axes."""
        steps = tuple(slice(None, None, part.step) for part in cut)
        tensor: torch.Tensor = self._slice(name)[tuple(slice(part.start, part.stop) for part in cut) or slice(None)]
        return tensor[steps] if cut else tensor

    def _slice(self, name: str):  # type: ignore[no-untyped-def]  # an untyped extension class of safetensors
        return self._handles[self._file_by_name[name]].get_slice(name)


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoint in `directory`, closed on leaving. Raises WeightsError when files are missing or damaged."""
    with ExitStack() as files:
        yield Checkpoint(directory, files)


def _listed_files(directory: Path) -> dict[str, str]:
    """File of each tensor according to the index; empty without an index."""
    path = directory / _INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{path} is not a checkpoint index: {exc!r}") from exc


def _open(path: Path):  # type: ignore[no-untyped-def]  # an untyped extension class of safetensors
    if not path.is_file():
        raise WeightsError(f"no checkpoint file {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as exc:
        raise WeightsError(f"{path} is damaged: {exc}") from exc
