"""What keeps a checkpoint from fitting a model, in words that stay readable for tens of thousands of tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from atom_cluster.weights.pieces import accepts
from atom_cluster.weights.rules import CheckpointMap
from atom_cluster.weights.safetensors_reader import Checkpoint

_MAX_ALIKE = 4
"""So many tensors that differ only in numbers (layers, experts) are listed one by one; of more only the first."""
_MAX_LINES = 40
"""Of each kind of problem."""


def find_problems(checkpoint_map: CheckpointMap, checkpoint: Checkpoint) -> list[str]:
    """Lines that name every tensor that is missing, unused, mis-shaped or of a wrong dtype. Reads no tensors."""
    expected, found = checkpoint_map.parts.keys(), checkpoint.names
    missing = dict.fromkeys(sorted(expected - found), "")
    unused = {name: "" for name in sorted(found - expected) if not checkpoint_map.is_ignored(name)}
    shapes, dtypes = {}, {}
    for name, part in sorted(checkpoint_map.each_part(), key=lambda item: item[0]):
        if name not in found:
            continue
        entry = checkpoint.entry(name)
        # A scalar may be stored as a vector of one, and the other way round.
        if (entry.shape or (1,)) != (part.full_shape or (1,)):
            shapes[name] = f" is {list(entry.shape)}, the model needs {list(part.full_shape)}"
        if not accepts(part.target.dtype, entry.dtype_name):
            dtypes[name] = f" is {entry.dtype_name}, the model needs {str(part.target.dtype).removeprefix('torch.')}"
    kinds = {"missing": missing, "unused": unused, "wrong shape": shapes, "wrong dtype": dtypes}
    return [f"  {kind}: {line}" for kind, details in kinds.items() for line in _shorten(details)]


def _shorten(details: dict[str, str]) -> Sequence[str]:
    """A line per tensor, or per group of many tensors that are alike."""
    alike = defaultdict(list)
    for name, detail in details.items():
        alike[re.sub(r"(?<![A-Za-z_])\d+", "*", name), detail].append(name)
    lines = []
    for (pattern, detail), names in alike.items():
        if len(names) <= _MAX_ALIKE:
            lines += [name + detail for name in names]
        else:
            lines.append(f"{names[0]}{detail} (and {len(names) - 1} more of {pattern})")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES - 1 :] = [f"... and {len(lines) - _MAX_LINES + 1} more"]
    return lines
