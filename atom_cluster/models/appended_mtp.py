"""Layers for multi-token prediction that a checkpoint keeps behind its other layers, as `model.layers.{num_layers}`.

Their copies of embedding (`embed_tokens`) and head (`shared_head.head`) are the main model's and are not loaded.
"""

from __future__ import annotations

import re

from atom_cluster.models.hf_config import HfConfig


def read_num_appended_layers(config: HfConfig) -> int:
    """How many there are."""
    key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in config else "num_mtp_layers"
    return config.integer(key, 0, least=0)


def unused_names(prefix: str, *, num_layers: int, num_stored: int, num_built: int) -> tuple[str, ...]:
    """Regular expressions of the tensors that a model with the first `num_built` of `num_stored` layers has no use for.

    prefix: of the layers' names, such as `model.layers`.
    """
    layers = [rf"{re.escape(prefix)}\.{num_layers + index}" for index in range(num_stored)]
    copies = [rf"{layer}\.(embed_tokens|shared_head\.head)\.weight" for layer in layers[:num_built]]
    return (*copies, *(rf"{layer}\..*" for layer in layers[num_built:]))
