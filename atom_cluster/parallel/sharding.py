"""Which part of a full weight a rank holds. Knows no checkpoints and no layers, only shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.parallel.groups import Group
from atom_cluster.units import ceil_div


@dataclass(frozen=True, slots=True)
class Span:
    """`length` indices from `start` of an axis."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """The index behind the last one."""
        return self.start + self.length

    @property
    def as_slice(self) -> slice:
        """The same as a slice."""
        return slice(self.start, self.stop)

    def covering(self, unit: int) -> Span:
        """The units of so many indices that the span has any of, in units."""
        first = self.start // unit
        return Span(first, ceil_div(self.stop, unit) - first)


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of an axis of `full_size` indices."""

    span: Span
    full_size: int

    @classmethod
    def whole(cls, size: int) -> Share:
        """All of it."""
        return cls(Span(0, size), size)

    def common_unit(self, unit: int) -> int:
        """The largest part of `unit` in whose multiples the share begins and ends; `unit` if it is the whole axis.

        Ranks with equal shares have it in common, whichever of them a unit's end happens to fit.
        """
        is_whole = self.span == Span(0, self.full_size)
        return unit if is_whole else math.gcd(unit, self.span.start, self.span.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPart:
    """Where one tensor of a checkpoint goes: `full[cut]`, its last two axes swapped if so said, is copied to `target`.

    Floats of two bytes and more are converted to the target's dtype. All others (integers, floats of one byte) are
    copied as they are, so the checkpoint's dtype must be the target's; a uint8 target also takes E8M0 scales, and an
    int64 target int32 numbers.
    """

    target: torch.Tensor
    """A view into a layer's weight, of the shape of what is copied."""
    full_shape: tuple[int, ...]
    """Shape the checkpoint's tensor must have."""
    cut: tuple[slice, ...] = ()
    """For the leading axes, with positive steps; the other axes whole."""
    is_transposed: bool = False


WeightParts = WeightPart | tuple[WeightPart, ...]
"""Where one tensor of a checkpoint goes: to one place or to several, each with the same full shape."""


def whole(target: torch.Tensor) -> WeightPart:
    """A tensor that every rank holds all of."""
    return WeightPart(target=target, full_shape=tuple(target.shape))


def even_span(size: int, group: Group, *, what: str, unit: int = 1) -> Span:
    """This rank's share of an axis of `size` indices, cut at multiples of `unit` (a head, say).

    Raises ConfigError, naming `what`, when the units do not divide evenly.
    """
    num_units = size // unit
    if num_units % group.size != 0:
        raise ConfigError(f"parallel.tensor = {group.size} does not divide the model's {num_units} {what}")
    length = size // group.size
    return Span(group.rank * length, length)


def expert_span(num_experts: int, group: Group) -> Span:
    """The experts that this rank holds. Raises ConfigError when they do not divide evenly."""
    if num_experts % group.size != 0:
        raise ConfigError(f"parallel.expert = {group.size} does not divide the model's {num_experts} experts")
    length = num_experts // group.size
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
