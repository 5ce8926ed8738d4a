"""The process of rank 0 without Ray: an engine in one thread, its place on the cluster's network in another."""
