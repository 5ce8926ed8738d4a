"""What mixture-of-experts models with grouped-query attention have in common; families add their configuration."""
