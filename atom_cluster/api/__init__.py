"""The HTTP API: OpenAI requests in, text out. No Ray, no torch; tokens come from a `Generator`."""
