"""GLM-4-MoE: a decoder of grouped-query attention and experts, with layers behind it that draft further tokens."""

from __future__ import annotations

from atom_cluster.models.appended_mtp import AppendedMtpModel
from atom_cluster.models.moe_decoder.model import MoeDecoderForCausalLM
from atom_cluster.models.moe_decoder.spec import MoeDecoderSpec


class Glm4MoeForCausalLM(AppendedMtpModel[MoeDecoderSpec], MoeDecoderForCausalLM):
    """A whole model, this rank's shard of it."""
