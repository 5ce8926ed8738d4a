"""gpt-oss: layers with windows and sinks, and experts."""
