"""The configuration tree, how a Serve YAML becomes one, and how its automatic values are decided. No torch, no Ray."""
