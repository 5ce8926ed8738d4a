"""Authenticated, bounded messages between the processes of a cluster, over ZMQ with CURVE. No Ray, no torch."""
