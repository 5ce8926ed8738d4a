"""Routes that generate nothing: models, health, tokens, profiles and timelines."""
