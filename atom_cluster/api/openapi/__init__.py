"""The API's own description: /openapi.json, and /docs for people."""
