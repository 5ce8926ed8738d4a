"""CheckpointMap: which tensors of a checkpoint a model takes and where they go. Knows no files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from atom_cluster.parallel.sharding import WeightPart, WeightParts


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMap:
    """All tensors that a rank's shard of a model is made of."""

    parts: Mapping[str, WeightParts]
    """By tensor name in the checkpoint; each must be there."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of whole names that may be in the checkpoint and carry nothing the model needs."""

    def each_part(self) -> Iterator[tuple[str, WeightPart]]:
        """All parts, each with the name of its tensor."""
        for name, parts in self.parts.items():
            for part in parts if isinstance(parts, tuple) else (parts,):
                yield name, part

    def is_ignored(self, name: str) -> bool:
        """Whether `name` may be in the checkpoint without being used."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


class LoadableModel(Protocol):
    """A model between its construction and its first step."""

    def checkpoint_map(self) -> CheckpointMap:
        """Where checkpoint tensors go. Valid until `finish_loading`."""
        ...

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend. Called once."""
        ...
