"""/v1/messages: the same answers for clients of Anthropic's API. Stateless, as the original."""
