"""`atom-cluster drill`: faults on purpose, under load, and whether what docs/reliability.md promises holds."""
