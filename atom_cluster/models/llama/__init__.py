"""The Llama family: Llama 2 and 3, Mistral, Ministral, Qwen2, Qwen3."""
