"""Qwen3.5, dense and with experts: the layers of Qwen3-Next, as the text part of a multimodal checkpoint or alone."""
