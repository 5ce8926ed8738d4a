"""Serve recipes: each picks how a configuration is laid out, and implements nothing."""
