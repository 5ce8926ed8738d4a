"""Chat and completions in OpenAI's words: requests, their checks, and the answers' shapes."""
