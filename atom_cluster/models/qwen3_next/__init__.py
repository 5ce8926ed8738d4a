"""Qwen3-Next: three layers of linear attention to one of full attention, mixtures of experts."""
