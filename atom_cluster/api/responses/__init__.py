"""/v1/responses: OpenAI's newer way to say the same as /v1/chat/completions. Stateless: nothing is stored."""
