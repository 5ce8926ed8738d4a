"""One rank of an engine: model, KV memory and sampler. Knows nothing of requests' fates, HTTP or Ray."""
