"""The status page at /: what /v1/cluster and /metrics say, for people with a browser."""
