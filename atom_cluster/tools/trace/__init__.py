"""`atom-cluster trace`: what the steps of a profiler window were spent on, as tables and pictures."""
