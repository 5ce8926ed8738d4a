"""Which layers of a model see a window of positions only, from its HF configuration. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence

from atom_cluster.models.hf_config import HfConfig

LayerWindows = tuple[int | None, ...]
"""Per layer, how many positions a token sees, its own included; None: all."""

_KINDS = ("full_attention", "sliding_attention")


def read_windows(config: HfConfig, *, window: int | None, is_sliding: Sequence[bool]) -> LayerWindows:
    """`window` for the layers that `layer_types` calls sliding, or that `is_sliding` says when it is absent.

    Raises ConfigError for a list that does not fit the model, or a window that is needed and None.
    """
    kinds = config.strings("layer_types")
    if kinds is not None:
        if len(kinds) != len(is_sliding):
            raise config.error("layer_types", f"must name {len(is_sliding)} layers, got {len(kinds)}")
        if unknown := sorted(set(kinds) - set(_KINDS)):
            raise config.error("layer_types", f"{unknown[0]!r} is not supported (supported: {', '.join(_KINDS)})")
        is_sliding = [kind == "sliding_attention" for kind in kinds]
    if window is None and any(is_sliding):
        raise config.error("layer_types", "has sliding_attention, and the model has no sliding window")
    return tuple(window if sliding else None for sliding in is_sliding)


def keeps_all(windows: LayerWindows, index: int) -> bool:
    """Whether this layer must keep all positions for its model to have one that does: the first, if all see windows."""
    return index == 0 and None not in windows
