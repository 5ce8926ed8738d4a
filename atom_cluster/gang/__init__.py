"""The ranks of one replica: Ray actors, the channel between them, and the StepRunner that hides both. No torch."""
