"""Which part of a full weight a rank holds. Knows no checkpoints and no layers, only shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class Span:
    """`length` indices from `start` of an axis."""

    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPart:
    """Where one tensor of a checkpoint goes: `full[..., span along axis, ...]` is copied into `target`."""

    target: torch.Tensor
    """A view into a layer's weight; its shape is that of the part that is read."""
    full_shape: tuple[int, ...]
    """Shape the checkpoint's tensor must have."""
    axis: int = 0
    span: Span | None = None
    """None: the whole tensor."""


def even_span(size: int, group: Group, *, what: str, unit: int = 1) -> Span:
    """This rank's share of an axis of `size` indices, cut at multiples of `unit` (a head, say).

    Raises ConfigError, naming `what`, when the units do not divide evenly.
    """
    num_units = size // unit
    if num_units % group.size != 0:
        raise ConfigError(f"parallel.tensor = {group.size} does not divide the model's {num_units} {what}")
    length = size // group.size
    return Span(group.rank * length, length)


def kv_head_span(num_kv_heads: int, head_dim: int, group: Group) -> Span:
    """This rank's key/value heads, in rows of a projection. With more ranks than heads, neighbours share a head.

    Raises ConfigError when neither of `num_kv_heads` and the number of ranks divides the other.
    """
    if group.size <= num_kv_heads:
        return even_span(num_kv_heads * head_dim, group, what="key/value heads", unit=head_dim)
    if group.size % num_kv_heads != 0:
        raise ConfigError(
            f"parallel.tensor = {group.size} is not a multiple of the model's {num_kv_heads} key/value heads"
        )
    head = group.rank // (group.size // num_kv_heads)
    return Span(head * head_dim, head_dim)
