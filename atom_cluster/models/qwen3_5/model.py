"""Qwen3.5: the layers of Qwen3-Next with other input projections; in multimodal checkpoints, their text part."""

from __future__ import annotations

from atom_cluster.models.qwen3_next.model import Qwen3NextForCausalLM


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):  # noqa: N801  # its name in checkpoints
    """A checkpoint of the text model alone."""


class Qwen3_5ForConditionalGeneration(Qwen3NextForCausalLM):  # noqa: N801  # its name in checkpoints
    """The text model within a multimodal checkpoint. It sees no images: the tensors for them are left out."""

    prefix = "model.language_model"

    def ignored_names(self) -> tuple[str, ...]:
        """What sees, too."""
        return (*super().ignored_names(), r"model\.visual\..*")
