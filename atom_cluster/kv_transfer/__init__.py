"""KV blocks between the memories of engines: transports, the rank-side agent, and the engine-side handoff."""
