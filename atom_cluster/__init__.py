"""A serving cluster for large language models on Ray Serve, with prefill and decode on separate accelerators."""

__version__ = "0.1.0"
