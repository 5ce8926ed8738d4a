"""Text and token ids: the tokenizer, chat templates, and what the API reads of a model's files. Knows no HTTP."""
