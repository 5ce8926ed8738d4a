"""From checkpoint files to the tensors of a model."""
