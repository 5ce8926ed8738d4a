"""Paged KV blocks and the prefix cache, as ids and counts. No torch."""
