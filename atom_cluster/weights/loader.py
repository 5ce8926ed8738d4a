"""Loads a rank's shard of a checkpoint, strictly: nothing missing, nothing unused, every shape as expected."""

from __future__ import annotations

import torch

from atom_cluster.errors import WeightsError
from atom_cluster.weights.rules import CheckpointMap, LoadableModel
from atom_cluster.weights.safetensors_reader import Checkpoint


def load_weights(model: LoadableModel, checkpoint: Checkpoint) -> None:
    """Read this rank's part of every tensor into the model. Does not call `finish_loading`.

    Raises one WeightsError that names every tensor that is missing, unused, mis-shaped or of an unsupported dtype,
    before anything is read.
    """
    checkpoint_map = model.checkpoint_map()
    problems = _problems(checkpoint_map, checkpoint)
    if problems:
        raise WeightsError("the checkpoint does not fit the model:\n" + "\n".join(problems))
    for name, part in checkpoint_map.parts.items():
        if part.target.numel():
            source = checkpoint.read(name, part.cut)
            part.target.copy_(source.transpose(-2, -1) if part.is_transposed else source)


def storage_dtype(checkpoint: Checkpoint, compute_dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype that loses nothing: that of the checkpoint, if `compute_dtype` can hold all its values.

    A checkpoint that mixes dtypes, or is wider than the model computes, is converted to `compute_dtype` while loading.
    """
    dtypes = {checkpoint.float_dtype(name) for name in checkpoint.names}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype is None or torch.promote_types(dtype, compute_dtype) != compute_dtype:
        return compute_dtype
    return dtype


def _problems(checkpoint_map: CheckpointMap, checkpoint: Checkpoint) -> list[str]:
    expected, found = set(checkpoint_map.parts), checkpoint.names
    problems = [f"  missing: {name}" for name in sorted(expected - found)]
    problems += [f"  unused: {name}" for name in sorted(found - expected) if not checkpoint_map.is_ignored(name)]
    for name in sorted(expected & found):
        shape, expected_shape = checkpoint.shape(name), checkpoint_map.parts[name].full_shape
        if shape != expected_shape:
            problems.append(f"  wrong shape: {name} is {list(shape)}, the model needs {list(expected_shape)}")
        if checkpoint.float_dtype(name) is None:
            problems.append(f"  unsupported dtype: {name}")
    return problems
