"""Whether a model's answers are still right: samples that are shipped, thresholds per model."""
