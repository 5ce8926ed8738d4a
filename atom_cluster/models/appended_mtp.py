"""Layers for multi-token prediction that a checkpoint keeps behind its other layers, as `model.layers.{num_layers}`.

Their copies of embedding (`embed_tokens`) and head (`shared_head.head`) are the main model's and are not loaded.
"""

from __future__ import annotations

import re
from typing import cast

from atom_cluster.layers.mtp import MtpBlock, MtpLayer, MtpSpec
from atom_cluster.models.decoder import DecoderModel, S
from atom_cluster.models.hf_config import HfConfig


def read_num_appended_layers(config: HfConfig) -> int:
    """How many there are."""
    key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in config else "num_mtp_layers"
    return config.integer(key, 0, least=0)


class AppendedMtpModel(DecoderModel[S]):
    """A model whose layers for drafting are like its other layers, and behind them."""

    def build_draft_layer(self, index: int) -> MtpLayer:
        """A layer like the main ones."""
        spec, number = self.spec, self.spec.num_layers + index
        context = self.context.at(f"{self.prefix}.layers.{number}")
        block = cast("MtpBlock", self.build_layer(number, context))
        return MtpLayer(context, MtpSpec(hidden_size=spec.hidden_size, norm_eps=spec.norm_eps), block, self.head)

    def ignored_names(self) -> tuple[str, ...]:
        """Copies of embedding and head in layers that were built, and all of those that were not."""
        prefix, first = re.escape(f"{self.prefix}.layers."), self.spec.num_layers
        layers = [f"{prefix}{first + index}" for index in range(self.spec.num_draft_layers)]
        copies = [rf"{layer}\.(embed_tokens|shared_head\.head)\.weight" for layer in layers[: self.num_draft_layers]]
        return (*copies, *(rf"{layer}\..*" for layer in layers[self.num_draft_layers :]))
